"""The four phases of the tiny model. Each takes what the phases before it left, trains, and returns what it made.

encoder    a ViT learns to name what every patch shows                    trains: encoder (+ heads, thrown away)
language   a language model learns to answer from described tiles         trains: language model (+ attributes, too)
align      stage 1 of the paper: captions                                 trains: projector
instruct   stage 2 of the paper: questions, scale factor drawn per step   trains: projector, language model
"""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    set_seed,
)

from tokenpacker.hf.model import TokenPackerForConditionalGeneration
from tokenpacker.train.dataset import Steps, StepSpec
from tokenpacker.train.described import DescribedLanguageModel
from tokenpacker.train.encoder import DenseClassifier, LabelledTiles, collate_tiles
from tokenpacker.train.loop import Schedule, run_phase
from tokenpacker.train.recipes import TinyRecipe, align_steps, described_steps, instruct_steps

MAX_POSITIONS = 4096  # far above ten tiles of 144 tokens


def train_encoder(recipe: TinyRecipe, phase_dir: Path) -> CLIPVisionModel:
    """The encoder, its heads dropped."""
    set_seed(recipe.seed)
    config = CLIPVisionConfig(
        hidden_size=recipe.vision_dim,
        intermediate_size=4 * recipe.vision_dim,
        num_hidden_layers=recipe.vision_layers,
        num_attention_heads=recipe.vision_heads,
        image_size=recipe.image_size,
        patch_size=recipe.patch_size,
        hidden_act="gelu",  # CLIP's own quick_gelu takes a third longer per step on a CPU
    )
    classifier = DenseClassifier(config)
    schedule = recipe.encoder
    tiles = LabelledTiles(
        schedule.num_steps * schedule.batch_size,
        image_size=recipe.image_size,
        patch_size=recipe.patch_size,
        seed=recipe.seed,
    )
    run_phase(classifier, tiles, schedule, phase_dir=phase_dir, collate=collate_tiles, seed=recipe.seed)
    return classifier.encoder


def train_language(recipe: TinyRecipe, tokenizer: PreTrainedTokenizerBase, phase_dir: Path) -> LlamaForCausalLM:
    """The language model, its described tiles dropped."""
    set_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.language_dim,
        intermediate_size=recipe.language_mlp_dim,
        num_hidden_layers=recipe.language_layers,
        num_attention_heads=recipe.language_heads,
        num_key_value_heads=recipe.language_heads,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    language_model = LlamaForCausalLM(config)
    model = DescribedLanguageModel(language_model, tokenizer)
    _run_steps(model, described_steps(), recipe.language, tokenizer, phase_dir, recipe.seed)
    return language_model


def assemble(
    recipe: TinyRecipe, encoder: CLIPVisionModel, language_model: LlamaForCausalLM, image_token_id: int
) -> TokenPackerForConditionalGeneration:
    """The complete model, its projector freshly initialised from the recipe's seed."""
    set_seed(recipe.seed)
    model = TokenPackerForConditionalGeneration.from_parts(
        encoder,
        language_model,
        projector_config=recipe.projector,
        vision_levels=list(recipe.vision_levels),
        image_token_id=image_token_id,
    )
    model.model.vision_tower.set_attn_implementation("sdpa")  # joining the parts' configs leaves it unset
    return model


def align(
    model: TokenPackerForConditionalGeneration, recipe: TinyRecipe, tokenizer: PreTrainedTokenizerBase, phase_dir: Path
) -> TokenPackerForConditionalGeneration:
    """Stage 1, in place: only the projector learns."""
    _train_only(model, [model.model.projector])
    _run_steps(model, align_steps(recipe), recipe.align, tokenizer, phase_dir, recipe.seed + 1)
    return model


def instruct(
    model: TokenPackerForConditionalGeneration, recipe: TinyRecipe, tokenizer: PreTrainedTokenizerBase, phase_dir: Path
) -> TokenPackerForConditionalGeneration:
    """Stage 2, in place: projector and language model learn, the encoder stays frozen."""
    _train_only(model, [model.model.projector, model.model.language_model, model.lm_head])
    _run_steps(model, instruct_steps(recipe), recipe.instruct, tokenizer, phase_dir, recipe.seed + 2)
    return model


def _train_only(model: nn.Module, parts: list[nn.Module]) -> None:
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)


def _run_steps(
    model: nn.Module,
    spec: StepSpec,
    schedule: Schedule,
    tokenizer: PreTrainedTokenizerBase,
    phase_dir: Path,
    seed: int,
) -> None:
    steps = Steps(spec, tokenizer, num_steps=schedule.num_steps, seed=seed)
    run_phase(model, steps, schedule, phase_dir=phase_dir, collate=_only_item, seed=seed)


def _only_item(items: list[dict[str, Any]]) -> dict[str, Any]:
    """An item of `Steps` is a whole batch already."""
    (item,) = items
    return item
