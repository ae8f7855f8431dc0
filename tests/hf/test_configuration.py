import pytest
from transformers import AutoConfig, LlamaConfig

from tokenpacker.hf import TokenPackerConfig
from tokenpacker.hf.configuration import paper_levels


def test_the_defaults_are_the_papers():
    config = TokenPackerConfig(
        {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "image_size": 336,
            "patch_size": 14,
        },
        LlamaConfig(),
    )
    assert config.vision_levels == [12, 16, 22, 23]
    assert config.vision_query_level == 23
    assert config.patch_grid == (24, 24)
    assert config.projector.num_tokens(config.patch_grid) == 144
    assert config.projector.language_dim == 4096


def test_negative_levels_count_from_the_last_layer():
    vision = {"model_type": "clip_vision_model", "num_hidden_layers": 12}
    config = TokenPackerConfig(vision, vision_levels=[6, -2], vision_query_level=-1)
    assert (config.vision_levels, config.vision_query_level) == ([6, 11], 12)


def test_the_config_survives_saving(tmp_path):
    config = TokenPackerConfig(projector_config={"name": "token-packer", "scale_factor": 3}, image_token_id=7)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, TokenPackerConfig)
    for name in ("projector_config", "vision_levels", "vision_query_level", "image_token_id"):
        assert getattr(again, name) == getattr(config, name)


def test_shallow_towers_need_their_levels_named():
    assert paper_levels(27) == [14, 18, 25, 26]  # SigLIP-so400m
    with pytest.raises(ValueError, match="6 layers has no default levels; pass vision_levels"):
        paper_levels(6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"vision_levels": [3, 13]}, "vision level 13 does not exist; the tower has layers 1 to 12"),
        ({"vision_levels": [0]}, "vision level 0 does not exist"),
        (
            {"projector_config": {"name": "token-packer", "vision_dim": 3}},
            "vision_dim=3 but the model's parts need 768",
        ),
        ({"projector_config": {"name": "pooling"}}, "unknown projector 'pooling'"),
        ({"region_config": {}}, "region_token_id=None with a region_config; give the id of <mask>"),
        ({"region_config": {}, "region_token_id": 32000}, "another than image_token_id=32000"),
        ({"region_config": {"num_levels": 3}, "region_token_id": 5}, "num_levels=3 but the model's parts need 4"),
        ({"region_config": {"heads": 3}, "region_token_id": 5}, "region_config has the unknown key 'heads'"),
        ({"text_config": {"model_type": "gemma2"}}, "final_logit_softcapping=30.0, which scales its logits"),
    ],
)
def test_what_does_not_fit_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TokenPackerConfig(**kwargs)
