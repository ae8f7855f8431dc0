"""Builds the model of a training run: loads it or joins its parts, freezes what is not trained, makes its processor."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel, PreTrainedModel

from tokenpacker import projectors
from tokenpacker.checkpoints.settings import MODEL_TYPES
from tokenpacker.checkpoints.weight_files import read_json
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.model import TokenPackerForConditionalGeneration
from tokenpacker.hf.pretrained import KEPT_WHOLE, four_bit_config
from tokenpacker.hf.processing.chat import chat_template
from tokenpacker.hf.processing.llama_tokenizer import IMAGE_TOKEN, load_llama_tokenizer
from tokenpacker.hf.processing.processor import TokenPackerProcessor
from tokenpacker.hf.regions.region_setup import add_region_token, add_regions
from tokenpacker.hub import check_name, fetch
from tokenpacker.regions import RegionConfig, RegionRule
from tokenpacker.train.config import LoraConfig, ModelConfig, TrainingConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, TrainingArguments

LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # linear layers of LLaMA
DEFAULT_RULE: RegionRule = "coverage"  # of a new region encoder
REMEDY = "give a folder or hub id"
SMALL_FILES = ["*.json", "*.jinja", "tokenizer*"]  # all but the weights
TOWER_PIXELS = "preprocessor_config.json"
PAD_TOKEN = "<pad>"


class ModelBuilder:
    """Builds what a `ModelConfig` names. Each name is resolved once, and the processor is made once.

    Args:
        with_regions: adds a region encoder and `<mask>` to a model without them.

    Raises:
        ValueError: for a name that is neither a folder nor a possible hub id, and for a missing `projector_weights`.
            The hub is not asked yet.
    """

    def __init__(self, settings: ModelConfig, *, with_regions: bool = False) -> None:
        self.settings, self.with_regions = settings, with_regions
        names = [settings.vision_tower, settings.language_model] if settings.start is None else [settings.start]
        for name in names:
            check_name(name, REMEDY)
        if settings.projector_weights is not None and not Path(settings.projector_weights).is_file():
            raise ValueError(f"model.projector_weights={settings.projector_weights} does not exist; check the path")

    @classmethod
    def of_run(cls, config: TrainingConfig) -> ModelBuilder:
        """The builder for a run's model. Raises ValueError as the class."""
        return cls(config.model, with_regions="regions" in config.train)

    @cached_property
    def config(self) -> TokenPackerConfig:
        """The model's config; no weights are read. Raises ValueError if the models do not exist or do not fit."""
        if self.settings.start is not None:
            config = TokenPackerConfig.from_pretrained(self._start_folder)
        else:
            vision = _read_config(self.settings.vision_tower, self._tower_folder)
            text = _read_config(self.settings.language_model, self._language_folder)
            config = TokenPackerConfig(getattr(vision, "vision_config", vision), text, **self._projector_settings)
        if self.with_regions and config.region_config is None:
            widths = {name: config.projector_config[name] for name in ("vision_dim", "language_dim", "num_levels")}
            config.region_config = RegionConfig(**widths).to_dict()
        return config

    @cached_property
    def processor(self) -> TokenPackerProcessor:
        """The processor, with the image rules and chat format of the run. Raises ValueError if a file is missing."""
        if self.settings.start is not None:
            processor = TokenPackerProcessor.from_pretrained(self._start_folder)
            processor.router = None  # its thresholds are fitted to weights that the run changes
        else:  # pixels are normalised as for the vision tower
            path = self._tower_folder / TOWER_PIXELS
            found = read_json(path) if path.is_file() else {}
            pixels = {name: found[name] for name in ("image_mean", "image_std") if name in found}
            processor = TokenPackerProcessor.from_config(self.config, self._load_tokenizer(), **pixels)
        for name in ("image_mode", "max_tiles", "grid_list", "thumbnail_source", "antialias"):
            if getattr(self.settings, name) is not None:
                setattr(processor.image_processor, name, getattr(self.settings, name))
        for name in ("row_separator", "region_rule"):
            if getattr(self.settings, name) is not None:
                setattr(processor, name, getattr(self.settings, name))
        processor.chat_template = chat_template(format=self.settings.chat_format)
        return knowing_regions(processor, self._region_rule) if self.with_regions else processor

    def build(self, config: TrainingConfig) -> TokenPackerForConditionalGeneration | PeftModel:
        """The model with its weights, on the CPU, with the parts frozen that the run does not train.

        Raises:
            ValueError: if the models do not exist, are damaged or do not fit.
            ImportError: for LoRA without peft, and four bits without bitsandbytes.
        """
        processor = self.processor  # reads the small files: a misfit is found before gigabytes are fetched
        dtype = getattr(torch, config.precision)
        load = self._join_parts if self.settings.start is None else self._load_start
        model = load(config.seed, dtype=dtype, **_quantization(config, joined=self.settings.start is None))
        if self.with_regions and model.model.region_encoder is None:
            torch.manual_seed(config.seed)  # decides the first weights of the region encoder
            add_regions(model, processor, rule=self._region_rule)
        return unfreeze(model, config)

    def _load_start(self, seed: int, **options: Any) -> TokenPackerForConditionalGeneration:
        start = str(self.settings.start)
        try:
            model, report = TokenPackerForConditionalGeneration.from_pretrained(
                _fetch_weights(start), output_loading_info=True, **options
            )
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"model.start={start} cannot be loaded ({' '.join(str(error).split())[:300]})") from error
        model.name_or_path = start  # an adapter saves this name and not the folder of the hub's cache
        missing = sorted(report["missing_keys"])
        if missing:  # else they would be trained from random numbers
            raise ValueError(f"model.start={start} lacks {len(missing)} weights of its config, such as {missing[0]}")
        return model

    def _join_parts(self, seed: int, **options: Any) -> TokenPackerForConditionalGeneration:
        tower = self._load_tower(options["dtype"])
        folder = _fetch_weights(self.settings.language_model)
        language_model = AutoModelForCausalLM.from_pretrained(folder, **options)
        tokenizer = self.processor.tokenizer
        if len(tokenizer) > language_model.config.vocab_size:
            language_model.resize_token_embeddings(len(tokenizer))
        torch.manual_seed(seed)  # decides the first weights of the projector
        model = TokenPackerForConditionalGeneration.from_parts(
            tower,
            language_model,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            **self._projector_settings,
        )
        if self._trained_projector is not None:
            model.model.multi_modal_projector.load_state_dict(self._trained_projector.state_dict())
        return model

    def _load_tower(self, dtype: torch.dtype) -> PreTrainedModel:
        """A vision tower; of a model for images and texts, its half for images."""
        folder = _fetch_weights(self.settings.vision_tower)
        if _read_config(self.settings.vision_tower, self._tower_folder).model_type == "clip":
            return CLIPVisionModel.from_pretrained(folder, dtype=dtype)
        whole = AutoModel.from_pretrained(folder, dtype=dtype)
        return getattr(whole, "vision_model", whole)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The language model's tokenizer with `<image>`. LLaMA's has a piece to spare; others get one more token."""
        folder = self._language_folder
        is_llama = read_json(folder / "config.json").get("model_type") == "llama"
        if is_llama and (folder / "tokenizer.model").is_file():
            return load_llama_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
        if tokenizer.pad_token in (None, tokenizer.eos_token):  # the end token would be masked as padding, not learned
            tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        return tokenizer

    @cached_property
    def _start_folder(self) -> Path:
        start = str(self.settings.start)
        folder = fetch(start, SMALL_FILES, REMEDY)
        if read_json(folder / "config.json").get("model_type") in MODEL_TYPES:
            raise ValueError(f"{start} is in the original layout; first run: tokenpacker convert {start} DST")
        return folder

    @cached_property
    def _tower_folder(self) -> Path:
        return fetch(self.settings.vision_tower, SMALL_FILES, REMEDY)

    @cached_property
    def _language_folder(self) -> Path:
        return fetch(self.settings.language_model, SMALL_FILES, REMEDY)

    @cached_property
    def _trained_projector(self) -> projectors.Projector | None:
        path = self.settings.projector_weights
        return None if path is None else projectors.load(path)

    @property
    def _projector_settings(self) -> dict[str, Any]:
        trained = self._trained_projector
        return {
            "projector_config": self.settings.projector if trained is None else trained.config.to_dict(),
            "vision_levels": list(self.settings.vision_levels) or None,
        }

    @property
    def _region_rule(self) -> RegionRule:
        return self.settings.region_rule or DEFAULT_RULE


def assemble(config: TrainingConfig) -> tuple[TokenPackerForConditionalGeneration | PeftModel, TokenPackerProcessor]:
    """The model and the processor of a run. Raises ValueError if the models do not exist or do not fit."""
    builder = ModelBuilder.of_run(config)
    return builder.build(config), builder.processor


def load_processor(model: ModelConfig, *, with_regions: bool = False) -> TokenPackerProcessor:
    """The processor alone; no weights are read. Raises ValueError if the models do not exist or do not fit."""
    return ModelBuilder(model, with_regions=with_regions).processor


def model_config(model: ModelConfig, *, with_regions: bool = False) -> TokenPackerConfig:
    """The model's config alone; no weights are read. Raises ValueError if the models do not exist or do not fit."""
    return ModelBuilder(model, with_regions=with_regions).config


def knowing_regions(processor: TokenPackerProcessor, rule: RegionRule = DEFAULT_RULE) -> TokenPackerProcessor:
    """The processor, with `<mask>` added in place if its tokenizer lacks it."""
    if processor.region_token_id is None:
        processor.tokenizer = add_region_token(processor.tokenizer)
        processor.region_rule = rule
    return processor


def parts_of(model: TokenPackerForConditionalGeneration) -> dict[str, list[torch.nn.Module]]:
    """The modules of each part. The head belongs to the language model; `regions` is empty without a region encoder."""
    regions = model.model.region_encoder
    return {
        "vision_tower": [model.model.vision_tower],
        "projector": [model.model.multi_modal_projector],
        "regions": [] if regions is None else [regions],
        "language_model": [model.model.language_model, model.lm_head],
    }


def unfreeze(
    model: TokenPackerForConditionalGeneration, config: TrainingConfig
) -> TokenPackerForConditionalGeneration | PeftModel:
    """Freezes the model except for the parts to train, and adds LoRA. Raises ImportError for LoRA without peft."""
    model.requires_grad_(False)
    for part in config.train:
        for module in parts_of(model)[part]:
            module.to(torch.float32).requires_grad_(True)  # small updates would be lost in bfloat16
    if config.liger:
        _use_liger(model)
    return model if config.lora is None else _with_lora(model, config.lora)


def starts_raw(config: TrainingConfig) -> bool:
    """Whether a run trains a new projector together with the language model, without a stage 1 before."""
    trains_language = "language_model" in config.train or config.lora is not None
    return trains_language and config.model.start is None and config.model.projector_weights is None


def fingerprint(model: torch.nn.Module, settings: ModelConfig) -> str:
    """Digest of some numbers of each weight that was loaded. New weights, of a projector or of LoRA, are left out."""
    digest = hashlib.sha256()
    loaded = settings.start or settings.projector_weights
    new = (".lora_",) if loaded else (".lora_", ".multi_modal_projector.")
    for name, parameter in model.named_parameters():
        if not any(mark in name for mark in new):
            some = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)]
            digest.update(name.encode() + some.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def merged_model(config: TrainingConfig, learned: Mapping[str, torch.Tensor]) -> TokenPackerForConditionalGeneration:
    """The result of a LoRA run as a plain model: loaded anew, with the updates merged into its weights.

    The model of the run itself may be in four bits or sharded; nothing can be merged into such weights.

    Args:
        learned: all trained weights, by their names in the run's model.
    """
    assert config.lora is not None
    model, _ = assemble(replace(config, lora=replace(config.lora, four_bit=False)))
    unknown = model.load_state_dict(learned, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"{unknown[0]} was trained and is not in the model; load the adapter beside it instead")
    return model.merge_and_unload()


def save_projector(
    model: TokenPackerForConditionalGeneration, path: Path, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Writes the projector alone, as stage 1 does.

    Args:
        weights: the gathered weights of a sharded model; None takes the model's own.
    """
    prefix = "model.multi_modal_projector."
    weights = model.state_dict() if weights is None else weights
    projector = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    projectors.save(model.config.projector, projector, path)


@contextmanager
def whole_weights(arguments: TrainingArguments) -> Iterator[None]:
    """Within its context, models load whole. ZeRO-3 would shard them while they load, and parts could not be joined.

    DeepSpeed shards the model afterwards. Until then each process holds all of it in main memory.
    """
    plugin = arguments.deepspeed_plugin
    if plugin is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(plugin.dschf)


def _read_config(name: str, folder: Path) -> Any:
    """The config of a vision tower or language model. Raises ValueError if there is none."""
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} has no config of a model ({str(error).splitlines()[0][:120]}); {REMEDY}") from None


def _fetch_weights(name: str) -> Path:
    """The folder of a model with all its files. Pickled weights are fetched only if there are no others."""
    folder = fetch(name, [*SMALL_FILES, "*.safetensors"], REMEDY)
    return folder if any(folder.glob("*.safetensors")) else fetch(name, [*SMALL_FILES, "pytorch_model*.bin"], REMEDY)


def _quantization(config: TrainingConfig, joined: bool) -> dict[str, Any]:
    """Options of `from_pretrained` for a language model in four bits."""
    if config.lora is None or not config.lora.four_bit:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("lora.four_bit needs bitsandbytes; run: pip install bitsandbytes")
    kept = ["lm_head"] if joined else list(KEPT_WHOLE)
    return {"quantization_config": four_bit_config(llm_int8_skip_modules=kept)}


def _use_liger(model: TokenPackerForConditionalGeneration) -> None:
    """Puts Liger's kernels into the language model; the Trainer's `use_liger_kernel` looks at the whole model alone."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise ImportError("liger=true needs liger-kernel; run: pip install liger-kernel")
    if not torch.accelerator.is_available():
        raise ValueError("liger=true needs a GPU, as its kernels are written in Triton; leave it out")
    from liger_kernel.transformers import monkey_patch

    language_model = model.model.language_model
    apply = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(language_model.config.model_type)
    if apply is None:
        raise ValueError(f"liger=true has no kernels for {language_model.config.model_type}; leave it out")
    apply(model=language_model, cross_entropy=False, fused_linear_cross_entropy=False)  # the whole model has the loss


def _with_lora(model: TokenPackerForConditionalGeneration, lora: LoraConfig) -> PeftModel:
    """The model with low-rank updates in its language model; other parts that are trained stay as they are."""
    try:
        from peft import LoraConfig as PeftLoraConfig
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft; run: pip install 'tokenpacker[train]'") from error
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = "|".join(LORA_LAYERS)
    targets = rf"model\.language_model\..*\.({layers})"
    settings = PeftLoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    wrapped = get_peft_model(model, settings)
    for parameter in trained:  # peft freezes everything but its own weights
        parameter.requires_grad_(True)
    return wrapped
