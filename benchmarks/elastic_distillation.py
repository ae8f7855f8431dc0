"""Does it help TokenPacker, trained over all scale factors, to learn its answers with few tokens from those with many?

    python -m benchmarks.elastic_distillation --features FOLDER --runs FILE [--json FILE] [--figure FILE]

trains one TokenPacker and one reader over five scale factors on the letters probe, in three ways: `plain` draws a
scale factor for each step; `distilled` has the model's own answers at a smaller one as soft labels beside the letters;
`plain, equal compute` is `plain` with as many more steps as the second forward costs. FOLDER holds features and
characters as in `load`; runs are appended to FILE, and those that stand there are not run again. Half an hour on a
core.

Shapes: N pictures of a batch, T packed tokens, D width of the reader, Q = 48 queries, K = 36 characters.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenpacker import TokenPacker, TokenPackerProjectorConfig, VisionFeatures
from tokenpacker.compare.intervals import Mean
from tokenpacker.progress import Progress

GRID, WIDTH, LEVELS = (24, 24), 96, 4  # of the features
LETTERS, CHARACTERS = (6, 8), 36
DIM, HEADS, LAYERS, SHARPNESS = 128, 4, 2, 1.5  # of the reader
SCALE_FACTORS = (2, 3, 4, 6, 8)
LEARNING_RATE, WEIGHT_DECAY, WARM_UP, BATCH, MAX_GRAD_NORM = 1e-3, 0.01, 50, 8, 1.0
RAMP = 0.5  # share of the training in which the weight of the soft labels rises from 0
SEEDS = (0, 1, 2)
STEPS, WEIGHT = 500, 1.0  # the weight was chosen on the pictures of dev with seed 100
NUM_TRAIN, NUM_TEST = 1600, 320
COST_STEPS, COST_ROUNDS = 55, 3
LONGER = "plain, equal compute"
SUMMARY = "Does TokenPacker, trained over all scale factors, gain from its own answers with more tokens?"

Pictures = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Way:
    """How a run trains. `weight` is that of the soft labels at the end of the ramp; 0 computes no teacher."""

    steps: int
    weight: float = 0.0


class Reader(nn.Module):
    """A transformer decoder whose queries, one for each character, read any number of packed tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(sines(*GRID).T.unflatten(1, GRID)[None])  # (1, D, h, w)
        self.queries = nn.Parameter(sines(*LETTERS))  # so that each looks at its own place from the first step on
        self.norm = nn.LayerNorm(DIM)
        layer = nn.TransformerDecoderLayer(
            DIM, HEADS, 4 * DIM, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, LAYERS, nn.LayerNorm(DIM))
        for each in self.decoder.layers:
            with torch.no_grad():  # query and key projections
                each.multihead_attn.in_proj_weight[: 2 * DIM] = SHARPNESS * torch.eye(DIM).repeat(2, 1)
        self.head = nn.Linear(DIM, CHARACTERS)

    def forward(self, tokens: Tensor, scale_factor: int) -> Tensor:
        """Logits (N, Q, K) from packed tokens (N, T, D). A token's place is the mean of its window's."""
        places = F.avg_pool2d(self.places, scale_factor, ceil_mode=True).flatten(2).transpose(1, 2)  # (1, T, D)
        return self.head(self.decoder(self.queries.expand(len(tokens), -1, -1), self.norm(tokens) + places))


def sines(rows: int, cols: int) -> Tensor:
    """Sines and cosines (rows*cols, D) of the places of a picture in so many rows and columns."""
    rates = 2 * math.pi * torch.logspace(math.log10(0.25), math.log10(8), DIM // 4)  # turns over the picture
    down, right = (((torch.arange(count) + 0.5) / count)[:, None] * rates for count in (rows, cols))  # (rows, D/4)
    sides = [torch.cat([angles.sin(), angles.cos()], dim=1) for angles in (down, right)]  # (rows, D/2)
    return torch.cat([sides[0][:, None].expand(-1, cols, -1), sides[1][None].expand(rows, -1, -1)], dim=-1).flatten(
        0, 1
    )


class Elastic(nn.Module):
    """TokenPacker and reader as one model, at any scale factor."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = TokenPacker(TokenPackerProjectorConfig(vision_dim=WIDTH, language_dim=DIM, num_levels=LEVELS))
        self.reader = Reader()

    def forward(self, levels: Tensor, scale_factor: int) -> Tensor:
        """Logits (N, Q, K) from levels (N, h*w, 4*C); the query's level is the deepest."""
        features = VisionFeatures(levels[..., -WIDTH:], levels, GRID)
        return self.reader(self.projector(features, scale_factor), scale_factor)


def teacher_of(scale_factor: int, progress: float) -> int | None:
    """The smaller scale factor that this one learns from after a share of the training; None for the smallest.

    The lead grows: at first it is the next smaller one, at the end the smallest of all.
    """
    place = SCALE_FACTORS.index(scale_factor)
    lead = 1 + int(progress * (len(SCALE_FACTORS) - 1))
    return SCALE_FACTORS[max(0, place - lead)] if place else None


def loss_of(model: nn.Module, levels: Tensor, characters: Tensor, scale: int, weight: float, progress: float) -> Tensor:
    """Cross entropy of the answers, and their divergence from the model's own at a smaller scale factor."""
    answers = model(levels, scale).flatten(0, 1)
    loss = F.cross_entropy(answers, characters.flatten())
    better = teacher_of(scale, progress)
    if not weight or better is None:
        return loss
    with torch.no_grad():
        taught = model(levels, better).flatten(0, 1).log_softmax(dim=-1)
    soft = F.kl_div(answers.log_softmax(dim=-1), taught, reduction="batchmean", log_target=True)
    return loss + weight * min(1.0, progress / RAMP) * soft


def draws_of(seed: int, num_pictures: int, steps: int) -> tuple[list[Tensor], list[int]]:
    """The pictures and the scale factor of each step. A longer run of the same seed begins like a shorter one."""
    order, factors = torch.Generator().manual_seed(seed), random.Random(seed)
    epochs = -(-steps * BATCH // num_pictures)
    rows = torch.cat([torch.randperm(num_pictures, generator=order) for _ in range(epochs)])
    return list(rows.split(BATCH))[:steps], [factors.choice(SCALE_FACTORS) for _ in range(steps)]


def run(way: Way, seed: int, train: Pictures, test: Pictures) -> dict[str, Any]:
    """Trains and tests: the share of the test's characters that are named right, by scale factor."""
    torch.manual_seed(seed)
    model = Elastic()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARM_UP, total_iters=WARM_UP)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, way.steps - WARM_UP)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [WARM_UP])
    levels, characters = train
    seconds = 0.0
    with Progress("training", way.steps) as shown:
        for step, (rows, scale) in enumerate(zip(*draws_of(seed, len(levels), way.steps), strict=True)):
            begin = time.process_time()
            loss = loss_of(model, levels[rows].float(), characters[rows], scale, way.weight, step / way.steps)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            seconds += time.process_time() - begin
            shown.update(step + 1, f"loss {loss.item():.3f}")
    return {"accuracy": {scale: accuracy(model, scale, test) for scale in SCALE_FACTORS}, "cpu_seconds": seconds}


@torch.inference_mode()
def accuracy(model: nn.Module, scale_factor: int, pictures: Pictures) -> float:
    """Share of characters that are named right."""
    right = sum(
        int((model(levels.float(), scale_factor).argmax(-1) == characters).sum())
        for levels, characters in zip(*(part.split(32) for part in pictures), strict=True)
    )
    return right / pictures[1].numel()


def load(folder: Path, split: Literal["dev", "test"]) -> tuple[Pictures, Pictures]:
    """Features (P, h*w, 4*C) and characters (P, Q) of the probe for training and test, made where they are missing."""
    from tokenpacker.compare.probe.contract import find_encoder, find_questions
    from tokenpacker.compare.probe.encoders import encode

    counts = {"train": NUM_TRAIN, split: NUM_TEST}
    made = encode(find_questions("letters"), find_encoder("craft"), counts, folder)
    train, test = ((torch.from_numpy(np.array(made[name].features)), made[name].targets) for name in counts)
    return train, test


def measured_cost(train: Pictures) -> float:
    """How many plain steps take the processor's time of one distilled step: the median of rounds in turns."""
    few = (train[0][: 4 * BATCH], train[1][: 4 * BATCH])
    ways, ratios = (Way(COST_STEPS), Way(COST_STEPS, WEIGHT)), []
    for seed in range(COST_ROUNDS):
        plain, distilled = (run(way, seed, few, few)["cpu_seconds"] for way in ways)
        ratios.append(distilled / plain)
    return statistics.median(ratios)


def ways_of(cost: float) -> dict[str, Way]:
    """What is compared."""
    plain = Way(STEPS)
    return {"plain": plain, "distilled": Way(STEPS, WEIGHT), LONGER: Way(round(STEPS * cost))}


def rows_of(path: Path, train: Pictures, test: Pictures, seeds: Sequence[int], split: str) -> list[dict[str, Any]]:
    """All runs; each is appended to the file when it is finished, and those that stand there are taken from it."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def add(row: dict[str, Any]) -> dict[str, Any]:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        return row

    costs = [row["cost"] for row in rows if "cost" in row]
    cost = costs[0] if costs else add({"cost": measured_cost(train)})["cost"]
    found = []
    for seed in seeds:
        for name, way in ways_of(cost).items():
            key = {"name": name, "way": asdict(way), "seed": seed, "split": split}
            before = [row for row in rows if key.items() <= row.items()]
            found.append(before[0] if before else add(key | run(way, seed, train, test)))
    return [{"cost": cost}, *found]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies in percent and their paired differences from plain training, by way and scale factor, over seeds."""
    cost, runs = rows[0]["cost"], rows[1:]
    percent = {(row["name"], row["seed"]): {int(s): 100 * v for s, v in row["accuracy"].items()} for row in runs}
    seeds = sorted({seed for _, seed in percent})
    ways = list(dict.fromkeys(name for name, _ in percent))
    made: dict[str, Any] = {"cost": cost, "seeds": seeds, "steps": {row["name"]: row["way"]["steps"] for row in runs}}
    made["cpu_seconds"] = {
        name: statistics.mean(row["cpu_seconds"] for row in runs if row["name"] == name) for name in ways
    }
    for scale in SCALE_FACTORS:
        of = {name: [percent[name, seed][scale] for seed in seeds] for name in ways}
        against = {
            base: asdict(Mean.of([a - b for a, b in zip(of["distilled"], of[base], strict=True)]))
            for base in ("plain", LONGER)
        }
        accuracies = {name: asdict(Mean.of(values)) for name, values in of.items()}
        made[f"s={scale}"] = {"tokens": tokens_of(scale), "accuracy": accuracies, "distilled minus": against}
    return made


def tokens_of(scale_factor: int) -> int:
    """T of a picture."""
    return math.prod(-(-side // scale_factor) for side in GRID)


def table(made: dict[str, Any]) -> str:
    """The summary in Markdown."""
    ways, lines = list(made["steps"]), []
    heads = [f"{name} ({made['steps'][name]:,} steps)" for name in ways]
    lines.append(f"| tokens | {' | '.join(heads)} | distilled - plain | distilled - {LONGER} |")
    lines.append("|---" * (len(ways) + 3) + "|")
    for scale in SCALE_FACTORS:
        of = made[f"s={scale}"]
        cells = [Mean(**of["accuracy"][name]).text() for name in ways]
        cells += [Mean(**of["distilled minus"][base]).text(sign="+") for base in ("plain", LONGER)]
        lines.append(f"| {of['tokens']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(made: dict[str, Any], path: Path) -> None:
    """The figure: accuracy over tokens."""
    from matplotlib.figure import Figure

    figure = Figure((6, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    looks = zip(made["steps"], (("#343a40", "o", "-"), ("#d9480f", "s", "-"), ("#343a40", "^", "--")), strict=True)
    for name, (color, shape, line) in looks:
        points = [(of["tokens"], of["accuracy"][name]) for of in (made[f"s={scale}"] for scale in SCALE_FACTORS)]
        halves = [of["half"] or 0 for _, of in points]
        axes.errorbar(
            [tokens for tokens, _ in points], [of["mean"] for _, of in points], halves,
            color=color, marker=shape, linestyle=line, capsize=3, label=f"{name}, {made['steps'][name]:,} steps",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([tokens_of(scale) for scale in SCALE_FACTORS], [str(tokens_of(scale)) for scale in SCALE_FACTORS])
    axes.minorticks_off()
    axes.set_xlabel("packed tokens of a picture (logarithmic)\nbars: 95 % interval over seeds")
    axes.set_ylabel("characters named right, %")
    axes.set_title("One TokenPacker for all scale factors, on the letters probe")
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elastic_distillation", description=SUMMARY)
    parser.add_argument("--features", type=Path, required=True, help="folder of the probe's features; made if missing")
    parser.add_argument("--runs", type=Path, required=True, help="JSONL file with a row for each run")
    parser.add_argument("--split", choices=("dev", "test"), default="test", help="pictures to judge with")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--json", type=Path, help="write the summary here")
    parser.add_argument("--figure", type=Path, help="write the figure here (PNG)")
    options = parser.parse_args()
    made = summary(rows_of(options.runs, *load(options.features, options.split), options.seeds, options.split))
    print(table(made))
    if options.json:
        options.json.write_text(json.dumps(made, indent=2) + "\n")
    if options.figure:
        draw(made, options.figure)


if __name__ == "__main__":
    main()
