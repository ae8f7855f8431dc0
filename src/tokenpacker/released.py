"""The released TokenPacker checkpoints: where they are, their settings, and their published scores.

Every number comes from the source that its row names. A value that no source gives is None or left out.
"""

from __future__ import annotations

from dataclasses import dataclass

PATCHES_PER_SIDE = 24  # of CLIP-L/14 at 336 pixels, the vision tower of all of them

MODEL_ZOO = "https://github.com/CircleRadon/TokenPacker, README.md, Model Zoo"
OSPREY_BRANCH = (
    "https://github.com/CircleRadon/TokenPacker, branch tokenpacker-hd-osprey, scripts/v1_5 and llava/configs"
)
TABLE_1 = "https://arxiv.org/abs/2407.02392v4, Table 1"
TABLE_2 = "https://arxiv.org/abs/2407.02392v4, Table 2"

Score = float | tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ReleasedModel:
    """One released checkpoint.

    Args:
        name: its usual name.
        hub_id: its name on the Hugging Face hub; None if it was not published.
        language_model: the language model before training.
        resolution: (height, width) in pixels of the largest image, as published.
        scale_factor: patches per side behind one token.
        mean_tokens: tokens per image as published: exact for one tile, else the mean over training and test images.
        max_tiles: limit of rows*cols without the thumbnail; None for a model that does not cut images.
        training_data: of the first stage + of the second.
        facts_from: source of all the above.
        scores: benchmark and published score; MME has two.
        scores_from: source of the scores; None if none were found.
        note: anything else.
    """

    name: str
    hub_id: str | None
    language_model: str
    resolution: tuple[int, int] | None
    scale_factor: int
    mean_tokens: int | None
    max_tiles: int | None
    training_data: str
    facts_from: str = MODEL_ZOO
    scores: tuple[tuple[str, Score], ...] = ()
    scores_from: str | None = None
    note: str = ""

    @property
    def tokens_per_tile(self) -> int:
        """Packed tokens of one tile, its separator not counted."""
        return (PATCHES_PER_SIDE // self.scale_factor) ** 2


def _one_tile(size: str, *scores: float) -> ReleasedModel:
    benchmarks = ("MMB", "MM-Vet", "VizWiz", "VQAv2", "GQA", "POPE")
    return ReleasedModel(
        name=f"TokenPacker-{size}-144token",
        hub_id=f"sunshine-lwt/TokenPacker-{size}-144token",
        language_model=f"Vicuna-1.5-{size}",
        resolution=(336, 336),
        scale_factor=2,
        mean_tokens=144,
        max_tiles=None,
        training_data="558K + 665K",  # as LLaVA-1.5
        scores=tuple(zip(benchmarks, scores, strict=True)),
        scores_from=TABLE_1,
    )


def _high_resolution(size: str, max_tiles: int, scale_factor: int, mean_tokens: int, *scores: Score) -> ReleasedModel:
    benchmarks = ("TextVQA", "OCRB", "DocVQA", "MMB", "MMMU", "MME", "VQAv2", "VizWiz", "POPE")
    name = f"TokenPacker-HD-{size}-{max_tiles}patch-{(PATCHES_PER_SIDE // scale_factor) ** 2}token"
    return ReleasedModel(
        name=name,
        hub_id=f"sunshine-lwt/{name}",
        language_model=f"Vicuna-1.5-{size}",
        resolution={9: (1088, 1088), 16: (1344, 1344)}[max_tiles],
        scale_factor=scale_factor,
        mean_tokens=mean_tokens,
        max_tiles=max_tiles,
        training_data="1.2M + 1.5M",  # as Mini-Gemini
        scores=tuple(zip(benchmarks, scores, strict=True)),
        scores_from=TABLE_2,
    )


RELEASED_MODELS: tuple[ReleasedModel, ...] = (
    _one_tile("7b", 65.1, 33.0, 52.0, 77.9, 61.9, 87.0),
    _one_tile("13b", 68.0, 34.5, 55.6, 78.9, 62.5, 87.4),
    _high_resolution("7b", 9, 2, 954, 68.0, 452, 60.2, 67.4, 35.4, (1489, 338), 81.2, 54.7, 88.2),
    _high_resolution("13b", 9, 2, 954, 69.3, 498, 63.0, 69.5, 38.8, (1595, 356), 82.0, 59.2, 88.1),
    _high_resolution("13b", 16, 2, 1393, 70.6, 521, 70.0, 68.7, 37.4, (1574, 350), 81.7, 57.0, 88.0),
    _high_resolution("13b", 16, 3, 619, 68.8, 470, 63.0, 69.9, 38.2, (1577, 353), 81.7, 61.0, 87.6),
    _high_resolution("13b", 16, 4, 347, 68.4, 447, 58.0, 68.3, 36.9, (1577, 332), 81.2, 58.1, 88.0),
    ReleasedModel(
        name="Osprey on TokenPacker-HD-7b",
        hub_id=None,
        language_model="Vicuna-1.5-7b",
        resolution=None,
        scale_factor=2,
        mean_tokens=None,
        max_tiles=9,
        training_data="COCO, RefCOCO(+), Pascal-Part, PartImageNet + Osprey-724K, Visual Genome, VCR",
        facts_from=OSPREY_BRANCH,
        note=(
            "answers about regions. Its branch links no weights and gives no scores; what it says of itself is a local"
            " folder's name, with 144 tokens and 9 tiles."
        ),
    ),
)
"""The seven checkpoints on the hub, and the region model."""
