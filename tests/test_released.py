import re
import subprocess
import sys

import pytest

from tokenpacker.projectors import TokenPackerProjectorConfig
from tokenpacker.released import RELEASED_MODELS

ON_THE_HUB = [model for model in RELEASED_MODELS if model.hub_id]


def test_there_are_seven_checkpoints_and_a_region_model():
    assert len({model.hub_id for model in ON_THE_HUB}) == 7
    assert len(RELEASED_MODELS) == 8
    assert {model.max_tiles for model in ON_THE_HUB} == {None, 9, 16}


@pytest.mark.parametrize("model", ON_THE_HUB, ids=lambda model: model.name)
def test_the_facts_agree_with_the_name_that_the_authors_chose(model):
    size, tokens = re.search(r"-(\d+b)-.*?(\d+)token$", model.hub_id).groups()
    tiles = re.search(r"(\d+)patch", model.hub_id)
    assert model.language_model == f"Vicuna-1.5-{size}"
    assert model.tokens_per_tile == int(tokens)
    assert model.max_tiles == (int(tiles[1]) if tiles else None)


@pytest.mark.parametrize("model", RELEASED_MODELS, ids=lambda model: model.name)
def test_tokens_per_tile_are_what_the_projector_gives(model):
    config = TokenPackerProjectorConfig(vision_dim=1024, language_dim=4096, scale_factor=model.scale_factor)
    assert model.tokens_per_tile == config.num_tokens((24, 24))


def test_a_published_mean_lies_between_one_tile_and_the_largest_grid():
    for model in ON_THE_HUB:
        if model.max_tiles:
            assert model.tokens_per_tile < model.mean_tokens < (model.max_tiles + 1) * (model.tokens_per_tile + 1)


def test_every_row_names_its_sources():
    for model in RELEASED_MODELS:
        assert model.facts_from.startswith("https://")
        assert bool(model.scores) == bool(model.scores_from)
        assert model.scores or model.note


def test_the_means_over_the_six_benchmarks_are_those_of_the_paper():
    """Table 1 prints 62.8 and 64.5: a number mistyped here would show."""
    means = [sum(dict(model.scores).values()) / 6 for model in ON_THE_HUB if model.max_tiles is None]
    assert [round(mean, 1) for mean in means] == [62.8, 64.5]


def test_the_table_needs_neither_torch_nor_transformers():
    code = "import sys, tokenpacker.released; print({'torch', 'transformers', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr
