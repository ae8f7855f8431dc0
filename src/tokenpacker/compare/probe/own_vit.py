"""A small ViT that learned without labels: masked autoencoding (arXiv 2111.06377) on training pictures of the probe.

Most patches of a picture are hidden. The network sees the others and predicts the pixels of the hidden ones,
normalized within each patch. An example is a piece of a picture, enlarged to its size. The network is transformers'
ViTMAE.

    python -m tokenpacker.compare.probe.own_vit own-vit --stamps stamps

trains it on letters and photos, in some minutes, and prints the file of weights. Without --stamps it learns from
letters alone.

Shapes: P pictures, L = 24*24 patches, C = 128 channels.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from tokenpacker.compare.probe.contract import SIZE, Questions, find_questions
from tokenpacker.compare.results import digest_of
from tokenpacker.progress import Progress

NETWORK: dict[str, Any] = {
    "image_size": SIZE,
    "patch_size": 8,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "decoder_hidden_size": 64,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 256,
    "norm_pix_loss": True,
}
SIDE = SIZE // NETWORK["patch_size"]  # patches
LAYERS = (2, 4, 5, 6)  # whose outputs are the levels
MEAN, STD = 0.5, 0.25  # of the pixels, 0 to 1
HIDDEN = 0.75  # of the patches
SMALLEST_PIECE = 0.5  # of a picture's side
PICTURES, STEPS, BATCH, SEED = 1600, 800, 8, 0  # pictures of each set of questions
LEARNING_RATE, WARM_UP, WEIGHT_DECAY, BETAS = 1.5e-3, 50, 0.05, (0.9, 0.95)
SAVE_EVERY = 50  # steps


class OwnViT:
    """The trained encoder.

    Args:
        weights: the file that `pretrain` wrote.
    """

    name, patch_grid, num_levels, query_level = "own-vit", (SIDE, SIDE), len(LAYERS), -1

    def __init__(self, weights: Path | None = None) -> None:
        if weights is None or not weights.is_file():
            raise ValueError(
                f"the encoder own-vit needs the file of its weights, not {weights}; train it with python -m"
                " tokenpacker.compare.probe.own_vit FOLDER, and give the file that it prints"
            )
        self.weights = weights

    @cached_property
    def digest(self) -> str:
        """Of the file of weights."""
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()[:16]

    @cached_property
    def network(self) -> ViTMAEModel:
        """The encoder, which hides nothing."""
        network = ViTMAEModel(ViTMAEConfig(**NETWORK, mask_ratio=0.0))
        network.load_state_dict(load_file(self.weights))
        return network.eval()

    @torch.inference_mode()
    def levels(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """The outputs of four layers, each (P, L, C)."""
        in_order = torch.arange(SIDE**2).expand(len(pictures), -1)  # instead of the noise that shuffles patches
        states = self.network(_pixels(pictures), noise=in_order, output_hidden_states=True).hidden_states
        return [states[layer][:, 1:] for layer in LAYERS]  # CLS dropped


def pretrain(questions: Sequence[Questions], folder: Path, *, steps: int = STEPS) -> Path:
    """The encoder's weights, trained on these sets' pictures: a file in `folder`, named after all that decides it.

    A finished file is found again. A run that was killed goes on from its last saved step, to the same weights.
    """
    recipe = [NETWORK, HIDDEN, SMALLEST_PIECE, PICTURES, steps, BATCH, SEED, LEARNING_RATE, WARM_UP, WEIGHT_DECAY]
    file = folder / f"own-vit-{digest_of([recipe, *(one.digest for one in questions)])}.safetensors"
    if file.is_file():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED)
        model = ViTMAEForPreTraining(ViTMAEConfig(**NETWORK, mask_ratio=HIDDEN)).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS)
    state, part, done = file.with_suffix(".state"), file.with_suffix(".part"), 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["done"]
    with Progress("pretraining own-vit", steps, done=done) as shown:
        for step in range(done, steps):
            loss = _step(model, optimizer, questions, step, steps)
            shown.update(step + 1, f"loss {loss:.3f}")
            if (step + 1) % SAVE_EVERY == 0:
                saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": step + 1}
                torch.save(saved, part)
                part.replace(state)
    save_file(model.vit.state_dict(), part)
    part.replace(file)
    state.unlink(missing_ok=True)
    return file


def _step(
    model: ViTMAEForPreTraining, optimizer: torch.optim.Optimizer, questions: Sequence[Questions], step: int, steps: int
) -> float:
    """A step, whose pictures, pieces and hidden patches depend on its number alone. Returns the loss."""
    draw = random.Random(step)
    pixels = _pixels([_piece(questions[row % len(questions)], draw) for row in range(BATCH)])
    noise = torch.rand(BATCH, SIDE**2, generator=torch.Generator().manual_seed(step))
    for group in optimizer.param_groups:
        warm_up = min((step + 1) / WARM_UP, 1)
        group["lr"] = LEARNING_RATE * warm_up * (1 + math.cos(math.pi * step / steps)) / 2
    loss = model(pixels, noise=noise).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def _piece(questions: Questions, draw: random.Random) -> Image.Image:
    """A square of a training picture, enlarged."""
    picture, _ = questions.draw("train", draw.randrange(PICTURES))
    side = SIZE * draw.uniform(SMALLEST_PIECE, 1)
    left, top = draw.uniform(0, SIZE - side), draw.uniform(0, SIZE - side)
    return picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def _pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Normalized pixels (P, 3, SIZE, SIZE)."""
    bytes_ = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return ((bytes_.float() / 255 - MEAN) / STD).permute(0, 3, 1, 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m tokenpacker.compare.probe.own_vit`."""
    parser = argparse.ArgumentParser(prog="tokenpacker.compare.probe.own_vit", description="Trains own-vit.")
    parser.add_argument("folder", type=Path, help="where the weights go")
    parser.add_argument("--stamps", type=Path, help="folder of Tux Paint's stamps: learns from photos, too")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training (default: %(default)s)")
    options = parser.parse_args(arguments)
    photos = [] if options.stamps is None else [find_questions("photos", options.stamps)]
    print(pretrain([find_questions("letters"), *photos], options.folder, steps=options.steps))


if __name__ == "__main__":
    main()
