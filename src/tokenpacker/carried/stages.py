"""The foundations of the tiny model, which take the place of CLIP and Vicuna; the paper's two stages then follow.

encoder    a ViT learns to name what every patch shows             its heads are thrown away
language   a language model learns to answer from described tiles  its attributes are thrown away
"""

from pathlib import Path

from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    set_seed,
)

from tokenpacker.carried.described import DescribedLanguageModel
from tokenpacker.carried.encoder import DenseClassifier, LabelledTiles, collate_tiles
from tokenpacker.data.batches import only_item
from tokenpacker.scenes.steps import Steps
from tokenpacker.train.loop import run_phase
from tokenpacker.train.recipes import TinyRecipe, described_steps

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
    steps = Steps(described_steps(), tokenizer, num_steps=recipe.language.num_steps, seed=recipe.seed)
    run_phase(model, steps, recipe.language, phase_dir=phase_dir, collate=only_item, seed=recipe.seed)
    return language_model
