import pytest
import torch

from tokenpacker.compare.common_parts import Foundation, make_foundation
from tokenpacker.hf import carried_model_path


def test_the_encoder_is_the_carried_one_and_the_language_model_is_trained_once(tmp_path, monkeypatch):
    pytest.importorskip("easy_vqa", reason="the easy-vqa package is not installed")
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    from tokenpacker.hf import TokenPackerForConditionalGeneration

    made = make_foundation(tmp_path, language_steps=1)
    carried = TokenPackerForConditionalGeneration.from_pretrained(carried_model_path())
    encoder, language = (
        CLIPVisionModel.from_pretrained(made.encoder),
        AutoModelForCausalLM.from_pretrained(made.language_model),
    )
    expected = carried.model.vision_tower.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in encoder.state_dict().items())
    assert language.config.hidden_size == carried.config.text_config.hidden_size
    assert not torch.equal(language.lm_head.weight, carried.lm_head.weight)
    monkeypatch.setattr(
        "tokenpacker.carried.foundation.train_language", lambda *given: pytest.fail("it is there already")
    )
    again = make_foundation(tmp_path, language_steps=1)
    assert (again, again.digest) == (made, made.digest)


def test_the_digest_changes_with_a_single_weight(foundation_dir, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(foundation_dir, tmp_path / "changed")
    path = tmp_path / "changed" / "encoder" / "result" / "model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, path)
    assert Foundation.find(tmp_path / "changed").digest != Foundation.find(foundation_dir).digest
