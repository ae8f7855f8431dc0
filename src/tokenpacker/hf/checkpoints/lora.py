"""A LoRA adapter in the original layout: merged into the weights that pass by, or kept as an adapter for PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenpacker.hf.checkpoints import names
from tokenpacker.hf.checkpoints.files import read_json, read_tensors, stored_tensors

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_FOLDER = "adapter"  # within a converted model that keeps its adapter
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
# Settings under which the update is not simply scale * B A.
_UNSUPPORTED = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "alora_invocation_tokens",
)


@dataclass(frozen=True)
class Adapter:
    """An adapter's settings and, by the name of our weight that they update, its factors A (r, in) and B (out, r)."""

    settings: dict[str, Any]
    factors: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """The adapter in a folder.

        Raises:
            ValueError: for a damaged file, another kind of adapter, and keys that belong to no linear layer.
            ImportError: without peft.
        """
        _require_peft()
        settings = read_json(folder / ADAPTER_CONFIG)
        where = folder / ADAPTER_CONFIG
        if settings.get("peft_type") != "LORA":
            raise ValueError(f"{where} has peft_type={settings.get('peft_type')!r}; only LORA can be converted")
        used = [key for key in _UNSUPPORTED if settings.get(key)]
        if used or settings.get("bias", "none") != "none":
            raise ValueError(
                f"{where} sets {', '.join(used) or 'bias'}, which the original never did; merge it with peft"
            )
        file = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
        if file is None:
            raise ValueError(f"{folder} has no {' or '.join(ADAPTER_WEIGHTS)}; give the adapter's whole folder")
        stored = stored_tensors([file])
        unknown = [name for name in stored if _KEY.fullmatch(name) is None]
        if unknown:
            raise ValueError(f"{file} holds unknown tensors: {', '.join(sorted(unknown))}")
        pairs: dict[str, dict[str, Tensor]] = {}
        for name, tensor in read_tensors(file, stored):
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{file} is damaged: {name} holds NaN or infinity; fetch it anew")
            match = _KEY.fullmatch(name)
            assert match is not None
            ours = names.from_released(f"{match['module']}.weight", num_layers=0)
            if ours is None or len(ours) != 1:
                raise ValueError(f"{file} updates {match['module']}, which released models train without LoRA")
            pairs.setdefault(ours[0], {})[match["part"]] = tensor.clone()
        halves = [name for name, pair in pairs.items() if len(pair) != 2]
        if halves:
            raise ValueError(f"{file} lacks lora_A or lora_B of {', '.join(sorted(halves))}; fetch it anew")
        return cls(settings, {name: (pair["A"], pair["B"]) for name, pair in pairs.items()})

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ValueError when a factor has no weight of ours to update, or does not fit its shape."""
        for name, (a, b) in self.factors.items():
            shape, made = shapes.get(name), (b.shape[0], a.shape[1])
            if shape != made or a.shape[0] != b.shape[1]:
                raise ValueError(f"the adapter's update of {name} has shape {made}, the base model's weight {shape}")

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """The weight with its update, summed in float32; the weight itself when the adapter leaves it alone."""
        if name not in self.factors:
            return weight
        from peft import get_peft_model

        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.float())
        a, b = self.factors[name]
        model = get_peft_model(nn.ModuleDict({"linear": linear}), self._config(["linear"], rank=a.shape[0]))
        layer: Any = model.get_submodule("base_model.model.linear")
        layer.lora_A["default"].weight.data = a.float()
        layer.lora_B["default"].weight.data = b.float()
        merged: Any = model.merge_and_unload()
        return merged["linear"].weight.data.to(weight.dtype)

    def attach(self, model: nn.Module) -> PeftModel:
        """The model with the adapter beside its weights, as `PeftModel.from_pretrained` would give it."""
        from peft import get_peft_model, set_peft_model_state_dict

        wrapped = get_peft_model(model, self.peft_config())
        set_peft_model_state_dict(wrapped, self._state())
        return wrapped.eval()

    def save(self, folder: Path) -> None:
        """Writes the adapter as PEFT reads it, with the names of our weights."""
        folder.mkdir()
        save_file(self._state(), folder / ADAPTER_WEIGHTS[0], metadata={"format": "pt"})
        self.peft_config().save_pretrained(str(folder))

    def _state(self) -> dict[str, Tensor]:
        return {
            f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight": factor
            for name, factors in self.factors.items()
            for part, factor in zip("AB", factors, strict=True)
        }

    def peft_config(self) -> LoraConfig:
        """PEFT's config. Full names keep the vision tower out, whose layers are called like the language model's."""
        modules = sorted(name.removesuffix(".weight") for name in self.factors)
        rank = next(iter(self.factors.values()))[0].shape[0]
        return self._config(modules, rank)

    def _config(self, modules: list[str], rank: int) -> LoraConfig:
        from peft import LoraConfig

        return LoraConfig(
            r=rank,
            lora_alpha=self.settings.get("lora_alpha", 8),
            lora_dropout=self.settings.get("lora_dropout", 0.0),
            use_rslora=bool(self.settings.get("use_rslora", False)),
            target_modules=modules,
            inference_mode=True,
        )


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("LoRA checkpoints need peft; run: pip install 'tokenpacker[train]'") from error
