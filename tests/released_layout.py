"""Checkpoints in the original layout, made on the fly: small ones with random weights, and those of the golden data."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

HIDDEN, VOCABULARY, LAYERS, HEADS = 32, 320, 2, 4
TOWER_DIM, TOWER_LAYERS, PATCH, PATCHES = 64, 24, 4, 16  # 16-pixel tiles of 4 x 4 patches
TOWER = "model.vision_tower.vision_tower."
LANGUAGE_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": HEADS,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": VOCABULARY,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_act": "quick_gelu",
    "hidden_size": TOWER_DIM,
    "image_size": PATCH * 4,
    "intermediate_size": 24,
    "layer_norm_eps": 1e-5,
    "num_attention_heads": 1,
    "num_hidden_layers": TOWER_LAYERS,
    "patch_size": PATCH,
}


def linear(name: str, rows: int, cols: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, cols)} | ({f"{name}.bias": (rows,)} if bias else {})


def norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (TOWER_DIM,), f"{name}.bias": (TOWER_DIM,)}


def tower_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (TOWER_DIM,),
        "vision_model.embeddings.patch_embedding.weight": (TOWER_DIM, 3, PATCH, PATCH),
        "vision_model.embeddings.position_embedding.weight": (PATCHES + 1, TOWER_DIM),
    }
    shapes |= norm("vision_model.pre_layrnorm") | norm("vision_model.post_layernorm")
    for layer in (f"vision_model.encoder.layers.{index}." for index in range(TOWER_LAYERS)):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}self_attn.{name}", TOWER_DIM, TOWER_DIM)
        shapes |= linear(f"{layer}mlp.fc1", 24, TOWER_DIM) | linear(f"{layer}mlp.fc2", TOWER_DIM, 24)
        shapes |= norm(f"{layer}layer_norm1") | norm(f"{layer}layer_norm2")
    return shapes


def projector_shapes() -> dict[str, tuple[int, ...]]:
    prefix = "model.mm_projector."
    shapes = linear(f"{prefix}q_proj_1", TOWER_DIM, TOWER_DIM, bias=False) | norm(f"{prefix}ln_q_1")
    for name in "kv":
        shapes |= linear(f"{prefix}{name}_proj_1.0", TOWER_DIM, 4 * TOWER_DIM) | norm(f"{prefix}ln_{name}_1")
        shapes |= linear(f"{prefix}{name}_proj_1.2", TOWER_DIM, TOWER_DIM)
    shapes |= {f"{prefix}clip_attn.in_proj_weight": (3 * TOWER_DIM, TOWER_DIM)}
    shapes |= {f"{prefix}clip_attn.in_proj_bias": (3 * TOWER_DIM,)}
    shapes |= linear(f"{prefix}clip_attn.out_proj", TOWER_DIM, TOWER_DIM)
    return shapes | linear(f"{prefix}mlp.0", HIDDEN, TOWER_DIM) | linear(f"{prefix}mlp.2", HIDDEN, HIDDEN)


def language_model_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in (f"model.layers.{index}." for index in range(LAYERS)):
        for name in "qkvo":
            shapes |= linear(f"{layer}self_attn.{name}_proj", HIDDEN, HIDDEN, bias=False)
        shapes |= linear(f"{layer}mlp.gate_proj", 48, HIDDEN, bias=False)
        shapes |= linear(f"{layer}mlp.up_proj", 48, HIDDEN, bias=False)
        shapes |= linear(f"{layer}mlp.down_proj", HIDDEN, 48, bias=False)
        shapes |= {f"{layer}input_layernorm.weight": (HIDDEN,), f"{layer}post_attention_layernorm.weight": (HIDDEN,)}
        shapes |= {f"{layer}self_attn.rotary_emb.inv_freq": (HIDDEN // HEADS // 2,)}
    return shapes | {"lm_head.weight": (VOCABULARY, HIDDEN)}


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights around 0, norms around 1, and the rotary frequencies that a LLaMA has."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("inv_freq"):
            tensors[name] = 1 / 10000 ** (torch.arange(shape[0]).float() / shape[0])
            continue
        is_scale = ("norm" in name and name.endswith("weight")) or (".ln_" in name and name.endswith("weight"))
        tensors[name] = torch.randn(shape, generator=generator) * 0.2 + float(is_scale)
    return tensors


def save(tensors: dict[str, torch.Tensor], folder: Path, weights: str = "bin", shards: int = 1) -> None:
    """Weights as the original's libraries write them: one file, or shards and their index."""
    stem, suffix = ("pytorch_model", ".bin") if weights == "bin" else ("model", ".safetensors")
    write = torch.save if weights == "bin" else save_file
    names = sorted(tensors)
    if shards == 1:
        write(dict(tensors), folder / f"{stem}{suffix}")
        return
    weight_map = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}{suffix}"
        part = {name: tensors[name] for name in names[number::shards]}
        write(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder in the original layout."""
    files = sorted(folder.glob("pytorch_model*.bin"))
    if files:
        return {name: tensor for file in files for name, tensor in torch.load(file, weights_only=True).items()}
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A LLaMA tokenizer's files, trained on a few sentences."""
    folder = tmp_path_factory.mktemp("tokenizer")
    sentences = ["a quiet harbour, two boats and a lighthouse", "USER: what is it? ASSISTANT: A chat between"] * 50
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(specials))
    config = specials | {"legacy": False, "model_max_length": 256, "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def released_config(tower_folder) -> dict[str, Any]:
    """What stage 2 writes as config.json."""
    return LANGUAGE_MODEL | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "image_aspect_ratio": "slice",
        "mm_hidden_size": TOWER_DIM,
        "mm_projector_type": "tokenpacker",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(tower_folder),
        "scale_factor": 2,
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }


@pytest.fixture(scope="session")
def tower_tensors() -> dict[str, torch.Tensor]:
    return random_tensors(tower_shapes(), seed=1)


@pytest.fixture(scope="session")
def tower_folder(tower_tensors, tmp_path_factory) -> Path:
    """The vision tower as the hub has it."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "config.json").write_text(json.dumps(CLIP))
    save(tower_tensors, folder)
    return folder


@pytest.fixture(scope="session")
def complete_tensors(tower_tensors) -> dict[str, torch.Tensor]:
    """The state dict that stage 2 writes."""
    tensors = random_tensors(language_model_shapes(), seed=2) | random_tensors(projector_shapes(), seed=3)
    return tensors | {TOWER + name: tensor for name, tensor in tower_tensors.items()}


@pytest.fixture
def make_complete(released_config, complete_tensors, tokenizer_folder, tmp_path) -> Callable[..., Path]:
    """Writes a whole checkpoint: `make_complete(weights="safetensors", shards=3, tower=False, config={...})`.

    `change` gets the tensors before they are written; a value of None in `config` removes the key.
    """
    count = iter(range(100))

    def make(
        weights: str = "bin",
        shards: int = 1,
        tower: bool = True,
        config: dict[str, Any] | None = None,
        change: Callable[[dict[str, torch.Tensor]], object] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        folder = tmp_path / f"released-{next(count)}"
        shutil.copytree(tokenizer_folder, folder)
        content = released_config | (config or {})
        content = {key: value for key, value in content.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(content))
        kept = {name: t.to(dtype) for name, t in complete_tensors.items() if tower or not name.startswith(TOWER)}
        if change is not None:
            change(kept)
        save(kept, folder, weights, shards)
        return folder

    return make


@pytest.fixture(scope="session")
def base_folder(complete_tensors, tokenizer_folder, tmp_path_factory) -> Path:
    """The language model that training starts from."""
    folder = tmp_path_factory.mktemp("base") / "vicuna"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "config.json").write_text(json.dumps(LANGUAGE_MODEL))
    names = language_model_shapes()
    save({name: tensor for name, tensor in complete_tensors.items() if name in names}, folder)
    return folder


@pytest.fixture
def make_stage_1(released_config, complete_tensors, tmp_path) -> Callable[..., Path]:
    """Writes a stage-1 folder: config and projector, and what `extra` adds to it."""

    def make(config: dict[str, Any] | None = None, extra: dict[str, torch.Tensor] | None = None) -> Path:
        folder = tmp_path / "stage-1"
        folder.mkdir()
        content = (
            released_config | {"architectures": ["LlamaForCausalLM"], "tune_mm_mlp_adapter": True} | (config or {})
        )
        (folder / "config.json").write_text(json.dumps(content))
        projector = {name: tensor for name, tensor in complete_tensors.items() if "mm_projector" in name}
        torch.save(projector | (extra or {}), folder / "mm_projector.bin")
        return folder

    return make


@pytest.fixture
def lora_folder(released_config, complete_tensors, tmp_path) -> Path:
    """A LoRA checkpoint: adapter, projector, no tokenizer."""
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(released_config))
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "bias": "none",
        "target_modules": modules,
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    factors = {}
    for name, (rows, cols) in {n: s for n, s in language_model_shapes().items() if "_proj.weight" in n}.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        factors |= {f"{prefix}.lora_A.weight": (4, cols), f"{prefix}.lora_B.weight": (rows, 4)}
    torch.save(random_tensors(factors, seed=5), folder / "adapter_model.bin")
    projector = {f"base_model.model.{n}": t for n, t in complete_tensors.items() if "mm_projector" in n}
    torch.save(projector, folder / "non_lora_trainables.bin")
    return folder


@pytest.fixture(scope="session")
def make_golden(golden, tmp_path_factory) -> Callable[..., Path]:
    """Runs the golden data's script: `make_golden("--weights", "safetensors")` gives the folder with all its models."""
    main = runpy.run_path(str(golden / "make_checkpoint.py"))["main"]

    def make(*options: str) -> Path:
        folder = tmp_path_factory.mktemp("golden")
        before = sys.argv
        sys.argv = ["make_checkpoint", str(folder), "--tokenizer", str(golden / "tokenizer"), *options]
        try:
            main()
        finally:
            sys.argv = before
        return folder

    return make


@pytest.fixture(scope="session")
def golden_checkpoint(make_golden) -> Path:
    """The whole checkpoint that the golden cases were computed with."""
    return make_golden() / "llava-tokenpacker"
