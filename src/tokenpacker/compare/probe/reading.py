"""One run of the probe: a projector and a reader learn to answer the questions of pictures from packed tokens.

Shapes: N pictures of a batch, T packed tokens, D width of the reader, Q questions of a picture, K most answers of one.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenpacker.compare.probe.contract import NO_ANSWER, grid_centers
from tokenpacker.compare.probe.encoders import Encoded
from tokenpacker.features import VisionFeatures
from tokenpacker.projectors import ProjectorConfig, build

DIM, HEADS, LAYERS = 128, 4, 2
LEARNING_RATE, WEIGHT_DECAY, WARM_UP, BATCH = 1e-3, 0.01, 50, 16
MAX_GRAD_NORM = 1.0
WAVES = (0.25, 8.0)  # of the places' sines: the fewest and the most over a picture
LOOK = 1.5  # times the identity: the reader's query and key matrices at first
TEST_BATCH = 32
CURVE = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # shares of the steps after which the test pictures are asked, too


def sine_places(places: npt.NDArray[np.float64]) -> Tensor:
    """Sines and cosines (n, D) of places (n, 2) from 0 to 1; NaN stays."""
    waves = 2 * math.pi * torch.logspace(math.log10(WAVES[0]), math.log10(WAVES[1]), DIM // 4)
    angles = torch.from_numpy(places).float()[..., None] * waves  # (n, 2, D/4)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


class Reader(nn.Module):
    """A transformer decoder whose queries, one for each question, read packed tokens.

    At first, a query looks at the tokens where its question does. Otherwise hundreds of steps go by until it finds
    them, and a short training would measure those.

    Args:
        places: (Q, 2), where the questions look; NaN begins with random numbers. None is NaN for all.
    """

    def __init__(
        self,
        token_grid: tuple[int, int],
        num_classes: Sequence[int],
        places: npt.NDArray[np.float64] | None = None,
    ):
        super().__init__()
        self.places = nn.Parameter(sine_places(grid_centers(*token_grid)))
        queries = sine_places(np.full((len(num_classes), 2), np.nan) if places is None else places)
        self.queries = nn.Parameter(queries.where(~queries.isnan(), 0.02 * torch.randn_like(queries)))
        self.norm = nn.LayerNorm(DIM)
        layer = nn.TransformerDecoderLayer(
            DIM, HEADS, 4 * DIM, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        with torch.no_grad():  # queries and keys of the tokens, which the values follow in this matrix
            layer.multihead_attn.in_proj_weight[: 2 * DIM] = LOOK * torch.eye(DIM).repeat(2, 1)
        self.decoder = nn.TransformerDecoder(layer, LAYERS, nn.LayerNorm(DIM))
        self.head = nn.Linear(DIM, max(num_classes))
        exists = torch.arange(max(num_classes)) < torch.tensor(num_classes)[:, None]  # (Q, K)
        self.register_buffer("no_class", ~exists, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (N, Q, K) from packed tokens (N, T, D); -inf for classes that a question does not have."""
        memory = self.norm(tokens) + self.places
        answers = self.decoder(self.queries.expand(len(tokens), -1, -1), memory)  # (N, Q, D)
        return self.head(answers).masked_fill(self.no_class, -math.inf)


class Learner:
    """A projector and a reader that learn together; the same seed gives the same initial weights.

    Args:
        steps: of the whole training, which the learning rate depends on.
        places: where the questions look.
    """

    def __init__(
        self,
        config: ProjectorConfig,
        patch_grid: tuple[int, int],
        num_classes: Sequence[int],
        steps: int,
        seed: int,
        places: npt.NDArray[np.float64] | None = None,
    ):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.projector = build(config)
            self.reader = Reader(config.token_grid(patch_grid), num_classes, places)
        self.parameters = [*self.projector.parameters(), *self.reader.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
        rate = torch.optim.lr_scheduler.LambdaLR
        self.schedule = rate(self.optimizer, lambda step: learning_rate(step, steps))

    def learn(self, features: VisionFeatures, targets: Tensor) -> float:
        """One step with N pictures, whose targets are (N, Q). Returns the loss before it."""
        logits = self.reader(self.projector(features))  # (N, Q, K)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NO_ANSWER)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    @torch.inference_mode()
    def answers(self, pictures: Encoded) -> Tensor:
        """(P, Q), the answer to each question."""
        batches = (pictures.batch(rows)[0] for rows in torch.arange(len(pictures)).split(TEST_BATCH))
        return torch.cat([self.reader(self.projector(features)).argmax(dim=-1) for features in batches])


def read(
    config: ProjectorConfig,
    num_classes: Sequence[int],
    train: Encoded,
    test: Encoded,
    *,
    steps: int,
    seed: int,
    places: npt.NDArray[np.float64] | None = None,
    sorts: Mapping[str, int] = MappingProxyType({}),
    seen: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """Trains and tests, and returns what was measured, JSON-ready.

    Args:
        places: (Q, 2), where the questions look; see `contract.Questions`, as for `sorts`.
        seen: is called after each step, with its number.

    Returns:
        `accuracy`, the share of the test's questions that are answered right; `sorts`, the same for each sort of
        question if there are several; `curve`, [step, accuracy] on the way;
        `loss`, the mean of the last 20; `step_ms`, the median of a step; `seconds` of everything; `parameters` of the
        projector.
    """
    start = time.perf_counter()
    learner = Learner(config, train.patch_grid, num_classes, steps, seed, places)
    asked = {round(share * steps) for share in CURVE} | {steps}
    losses, times, curve = [], [], []
    for step, rows in enumerate(order_of(len(train), steps, seed), 1):
        began = time.perf_counter()
        losses.append(learner.learn(*train.batch(rows)))
        times.append(time.perf_counter() - began)
        if step in asked:
            answers = learner.answers(test)
            curve.append([step, share_right(answers, test.targets)])
        seen(step)
    return {
        "accuracy": curve[-1][1],
        **({"sorts": by_sort(answers, test.targets, sorts)} if len(sorts) > 1 else {}),
        "curve": curve,
        "loss": statistics.mean(losses[-20:]),
        "step_ms": 1000 * statistics.median(times),
        "seconds": time.perf_counter() - start,
        "parameters": sum(weight.numel() for weight in learner.projector.parameters()),
    }


def share_right(answers: Tensor, targets: Tensor) -> float:
    """The share of right answers (P, Q) among the questions with a target."""
    return int((answers == targets).sum()) / int((targets != NO_ANSWER).sum())


def by_sort(answers: Tensor, targets: Tensor, sorts: Mapping[str, int]) -> dict[str, float]:
    """`share_right` for each sort of question, which has so many of the Q in their order."""
    parts = zip(sorts, answers.split([*sorts.values()], dim=1), targets.split([*sorts.values()], dim=1), strict=True)
    return {sort: share_right(*part) for sort, *part in parts}


def learning_rate(step: int, steps: int) -> float:
    """The share of the learning rate at a step: a linear warm-up, then half a cosine down to 0."""
    warm_up = min(WARM_UP, steps // 4)
    if step < warm_up:
        return (1 + (WARM_UP - 1) * step / warm_up) / WARM_UP
    return (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2


def order_of(num_pictures: int, steps: int, seed: int) -> list[Tensor]:
    """The pictures of each step (N,). Every picture is seen once before one is seen again."""
    order = torch.Generator().manual_seed(seed)
    rounds = -(-steps * BATCH // num_pictures)
    rows = torch.cat([torch.randperm(num_pictures, generator=order) for _ in range(rounds)])
    return list(rows[: steps * BATCH].split(BATCH))


def begin_process(threads: int) -> None:
    """Prepares a process of runs: it leaves Ctrl-C to the process that started it, and ends when that one does."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "it is not the first process"
    parent.join()
    os._exit(1)
