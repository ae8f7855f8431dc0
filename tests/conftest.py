"""One tiny encoder, tokenizer and language model for all tests: random weights, no network."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from PIL import Image

pytest_plugins = ["browser", "released_layout"]

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder with outputs of the original code; tests that need it are skipped where it is absent."""
    if not GOLDEN.is_dir():
        pytest.skip("the golden data of the original code is not beside this checkout")
    return GOLDEN


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_deprecated_names_of_transformers():
    """Fails a test during which transformers logs that a name is deprecated; its warnings are errors by pytest."""
    heard = []
    old = Version(version("transformers")) < Version("5.24")

    class Ear(logging.Handler):
        def emit(self, record):
            message = record.getMessage()
            theirs = old and message.startswith("Passing `generation_config` together")  # by their own pipelines
            if "deprecated" in message and not theirs:
                heard.append(message)

    ear = Ear()
    logging.getLogger("transformers").addHandler(ear)
    yield
    logging.getLogger("transformers").removeHandler(ear)
    assert not heard


def byte_tokenizer():
    """A byte-level tokenizer: every byte is a token, so any text works and lengths are easy to check."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return byte_tokenizer()


def tiny_config(tokenizer, vision: str = "clip", text: str = "llama", tied: bool = False, **kwargs):
    """A model small enough for milliseconds: 32-pixel tiles of 8x8 patches, width 32, two language layers."""
    from tokenpacker.hf import TokenPackerConfig

    vision_types = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
    vision_config = {
        "model_type": vision_types[vision],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 4,
    }
    text_config = {
        "model_type": text,
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    kwargs.setdefault("vision_levels", [2, 3, 4, 5])
    kwargs.setdefault("projector_config", {"name": "token-packer", "num_heads": 4})
    return TokenPackerConfig(
        vision_config, text_config, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), **kwargs
    )


@pytest.fixture(scope="session")
def make_tiny_model(tiny_tokenizer):
    """Builds a random model: `make_tiny_model(vision="siglip", text="qwen2", ...)`."""

    def make(**kwargs):
        from tokenpacker.hf import TokenPackerForConditionalGeneration

        torch.manual_seed(0)
        return TokenPackerForConditionalGeneration(tiny_config(tiny_tokenizer, **kwargs)).eval()

    return make


@pytest.fixture(scope="session")
def tiny_model(make_tiny_model):
    return make_tiny_model()


@pytest.fixture(scope="session")
def tiny_processor(tiny_model, tiny_tokenizer):
    from tokenpacker.hf import TokenPackerProcessor

    return TokenPackerProcessor.from_config(tiny_model.config, tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_model, tiny_processor, tmp_path_factory) -> Path:
    """The tiny model as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def region_model(make_tiny_model, tiny_tokenizer):
    """A tiny model that knows regions, with its processor."""
    from tokenpacker.hf import TokenPackerProcessor, add_regions

    model = make_tiny_model()
    processor = TokenPackerProcessor.from_config(model.config, tiny_tokenizer)
    add_regions(model, processor)
    # untrained region tokens are small beside the others, and would change no answer
    torch.nn.init.normal_(model.model.region_encoder.output_proj.weight, std=3.0)
    return model.eval(), processor


@pytest.fixture(scope="session")
def region_model_dir(region_model, tmp_path_factory) -> Path:
    """The tiny model that knows regions as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("region-model")
    for part in region_model:
        part.save_pretrained(folder)
    return folder


def noise_image(height: int, width: int, seed: int = 0) -> Image.Image:
    """An RGB picture of seeded noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture(scope="session")
def image_of():
    """Makes a picture of a size: `image_of(64, 48, seed=1)`."""
    return noise_image
