from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tokenpacker.compare.common_parts import Foundation
from tokenpacker.compare.runs import Comparison


@pytest.fixture(scope="session")
def foundation_dir(tmp_path_factory) -> Path:
    """Encoder and language model of random weights, laid out as `train tiny` does: tiles of 4 x 4 patches, width 32."""
    pytest.importorskip("easy_vqa", reason="the easy-vqa package is not installed")
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from tokenpacker.carried.vocabulary import train_tokenizer

    folder = tmp_path_factory.mktemp("foundation")
    encoder, language = folder / "encoder" / "result", folder / "language" / "result"
    tokenizer = train_tokenizer()
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    CLIPVisionModel(CLIPVisionConfig(**small, image_size=32, patch_size=8)).save_pretrained(encoder)
    (encoder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.9] * 3, "image_std": [0.3] * 3}))
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    LlamaForCausalLM(LlamaConfig(**small, vocab_size=len(tokenizer), **special)).save_pretrained(language)
    tokenizer.save_pretrained(language)
    return folder


@pytest.fixture(scope="session")
def comparison_of(foundation_dir):
    """A comparison on that foundation, one step a stage: `comparison_of(projectors=("mlp",), seeds=(0, 1))`."""
    foundation = Foundation.find(foundation_dir)

    def make(**settings) -> Comparison:
        return Comparison(
            **{
                "vision_tower": str(foundation.encoder),
                "language_model": str(foundation.language_model),
                "foundation": foundation.digest,
                "scale_factors": (2,),
                "seeds": (0,),
                "steps": (1, 1),
                "limit": 6,
                "quick": True,
                "num_workers": 0,
                **settings,
            }
        )

    return make
