"""The optimizer of a run: AdamW with a learning rate per part, or Muon for matrices and AdamW for all other weights.

Muon (K. Jordan et al., 2024) makes the update of a matrix orthogonal by a Newton-Schulz iteration. Measured on the tiny
encoder: the loss that AdamW reaches after 250 steps is reached after 190. `torch.optim.Muon` computes in bfloat16,
several times slower on a CPU, hence this float32 version; matrices of equal shape are stacked into one product.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenpacker.train.config import OptimizerConfig, Part

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration, from its authors
NEWTON_SCHULZ_STEPS = 5
ADAM_BETAS, ADAM_EPS = (0.9, 0.98), 1e-8
MUON_MOMENTUM = 0.95
RMS_OF_ADAM = 0.2  # scales updates to the size that AdamW's have, so that one weight decay fits both


# Names of modules in parameter names, and the parts that they belong to.
PART_MODULES: dict[str, Part] = {
    "vision_tower": "vision_tower",
    "spare_vision_layers": "vision_tower",
    "multi_modal_projector": "projector",
    "region_encoder": "regions",
}


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer for the trainable weights of a model."""
    if config.muon_learning_rate is None:
        return torch.optim.AdamW(part_groups(model, config), lr=config.learning_rate, betas=config.betas)
    return MuonAdamW(
        model,
        learning_rate=config.learning_rate,
        muon_learning_rate=config.muon_learning_rate,
        weight_decay=config.weight_decay,
        betas=config.betas,
    )


def part_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, one for each part that has trainable parameters."""
    by_part: dict[Part, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_part.setdefault(part_of(name), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.part_learning_rates.get(part, config.learning_rate),
            "weight_decay": config.weight_decay,
            "name": part,
        }
        for part, parameters in by_part.items()
    ]


def part_of(name: str) -> Part:
    """The part that a parameter belongs to, by its full name. The head belongs to the language model."""
    for module, part in PART_MODULES.items():
        if f".{module}." in f".{name}":
            return part
    return "language_model"


class MuonAdamW(torch.optim.Optimizer):
    """Muon for parameter groups with `muon=True`, which hold matrices only, and AdamW for the others."""

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float,
        muon_learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float] = ADAM_BETAS,
    ) -> None:
        self.betas = betas
        matrices, others = split_parameters(model)
        groups = [
            {"params": matrices, "lr": muon_learning_rate, "muon": True},
            {"params": others, "lr": learning_rate, "muon": False},
        ]
        super().__init__([group for group in groups if group["params"]], {"weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the parameters. `closure`, as in torch's optimizers, recomputes the loss before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [(parameter, parameter.grad) for parameter in group["params"] if parameter.grad is not None]
            update = self._muon_step if group["muon"] else self._adam_step
            update(trained, group["lr"], group["weight_decay"])
        return loss

    def _muon_step(self, trained: list[tuple[Tensor, Tensor]], learning_rate: float, weight_decay: float) -> None:
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter, gradient in trained:
            by_shape[parameter.shape].append((parameter, gradient))
        for shape, same in by_shape.items():
            directions = []
            for parameter, gradient in same:
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
                directions.append(gradient.lerp(momentum, MUON_MOMENTUM))  # Nesterov
            size = RMS_OF_ADAM * max(shape) ** 0.5
            for (parameter, _), update in zip(same, orthogonalised(torch.stack(directions)), strict=True):
                parameter.mul_(1 - learning_rate * weight_decay).add_(update, alpha=-learning_rate * size)

    def _adam_step(self, trained: list[tuple[Tensor, Tensor]], learning_rate: float, weight_decay: float) -> None:
        first_decay, second_decay = self.betas
        for parameter, gradient in trained:
            state = self.state[parameter]
            if not state:
                state |= {"step": 0, "first": torch.zeros_like(parameter), "second": torch.zeros_like(parameter)}
            state["step"] += 1
            first, second = state["first"], state["second"]
            first.lerp_(gradient, 1 - first_decay)
            second.mul_(second_decay).addcmul_(gradient, gradient, value=1 - second_decay)
            scale = (second / (1 - second_decay ** state["step"])).sqrt_().add_(ADAM_EPS)
            decay = weight_decay if parameter.ndim > 1 else 0.0
            parameter.mul_(1 - learning_rate * decay)
            parameter.addcdiv_(first, scale, value=-learning_rate / (1 - first_decay ** state["step"]))


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices of hidden linears, all other trainable parameters); output heads are no hidden linears."""
    hidden = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in ("heads", "lm_head", "attributes"))
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if id(parameter) in hidden]
    return matrices, [parameter for parameter in trainable if id(parameter) not in hidden]


def orthogonalised(matrices: Tensor) -> Tensor:
    """(K, m, n) -> (K, m, n) with singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
