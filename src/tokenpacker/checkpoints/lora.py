"""A LoRA adapter of a released checkpoint: merged into the weights one by one, or kept as an adapter for PEFT.

PEFT merges only into a whole model in memory, and is optional. So reading and merging are done here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenpacker.checkpoints import tensor_names as names
from tokenpacker.checkpoints.weight_files import FETCH_AGAIN, check_finite, listed, read, read_json, stored_entries

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
# With these settings the update is more than scale * B A.
_UNSUPPORTED = (
    "fan_in_fan_out",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "alora_invocation_tokens",
)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Args:
        factors: factors A (rank, in) and B (out, rank) by the name of our weight that they update.
        settings: of PEFT's `LoraConfig`.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """The adapter in a folder.

        Raises:
            ValueError: for a damaged file, another kind of adapter, and keys that belong to no linear layer.
        """
        where = folder / ADAPTER_CONFIG
        settings = read_json(where)
        if settings.get("peft_type") != "LORA":
            raise ValueError(f"{where} has peft_type={settings.get('peft_type')!r}; only LORA can be converted")
        used = [key for key in _UNSUPPORTED if settings.get(key)]
        if used or settings.get("bias", "none") != "none":
            what = ", ".join(used) or "bias"
            raise ValueError(f"{where} sets {what}, which the original never did; merge it with peft")
        kept = {"r": None, "lora_alpha": None, "lora_dropout": 0.0} | settings
        kept = {key: kept[key] for key in ("r", "lora_alpha", "lora_dropout")}
        for key, value in kept.items():
            if type(value) not in (int, float) or not 0 <= value < float("inf"):
                raise ValueError(f"{where} has {key}={value!r}; it must be a number of at least 0")
        factors = _read_factors(folder)
        for name, (a, b) in factors.items():
            if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == kept["r"] > 0:
                shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
                raise ValueError(f"{folder}: the factors of {name} are {shapes}, which is not rank r={kept['r']}")
        return cls(factors, kept | {"use_rslora": settings.get("use_rslora") is True})

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ValueError if a factor has no weight of ours to update, or does not fit its shape."""
        for name, (a, b) in self.factors.items():
            shape, made = shapes.get(name), (b.shape[0], a.shape[1])
            if shape != made:
                raise ValueError(f"the adapter's update of {name} has shape {made}, the base model's weight {shape}")

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """The weight with its update, summed in float32."""
        a, b = self.factors[name]
        rank = self.settings["r"]
        scale = self.settings["lora_alpha"] / (rank**0.5 if self.settings["use_rslora"] else rank)
        return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)

    def attach(self, model: nn.Module) -> PeftModel:
        """The model with the adapter beside its weights, as `PeftModel.from_pretrained` would give it."""
        config = self.peft_config()
        from peft import get_peft_model, set_peft_model_state_dict

        wrapped = get_peft_model(model, config)
        set_peft_model_state_dict(wrapped, self._state())
        return wrapped.eval()

    def save(self, folder: Path) -> None:
        """Writes the adapter in PEFT's form, with the names of our weights."""
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
        """PEFT's config. It has full names of modules, for layers of the vision tower have the same short names.

        Raises:
            ImportError: without peft.
        """
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ImportError("keeping an adapter needs peft; run: pip install peft") from error
        modules = sorted(name.removesuffix(".weight") for name in self.factors)
        return LoraConfig(**self.settings, target_modules=modules, inference_mode=True)


def _read_factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    file = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} has no {' or '.join(ADAPTER_WEIGHTS)}; give the adapter's whole folder")
    stored = stored_entries([file])
    unknown = [name for name in stored if _KEY.fullmatch(name) is None]
    if unknown or not stored:
        raise ValueError(f"{file} holds {'unknown tensors: ' + listed(unknown) if unknown else 'nothing'}")
    pairs: dict[str, dict[str, Tensor]] = {}
    for entry, tensor in read(stored.values()):
        check_finite(tensor, None, f"{file}: {entry.name}")
        match = _KEY.fullmatch(entry.name)
        assert match is not None
        ours = names.from_released(f"{match['module']}.weight", num_layers=0)
        if len(ours) != 1 or not ours[0].startswith((names.LANGUAGE_MODEL, "lm_head.")):
            raise ValueError(f"{file} updates {match['module']}, which released models train without LoRA")
        pairs.setdefault(ours[0], {})[match["part"]] = tensor.clone()
    halves = [name for name, pair in pairs.items() if len(pair) != 2]
    if halves:
        raise ValueError(f"{file} lacks lora_A or lora_B of {listed(halves)}; {FETCH_AGAIN}")
    return {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}
