"""The model that a run trains: loaded, or put together from its parts, with what learns unfrozen."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
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
    from transformers import PreTrainedTokenizerBase

# Linear layers of LLaMA and its kin that LoRA updates.
LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEFAULT_RULE: RegionRule = "coverage"  # of a new region encoder
REMEDY = "give a folder or hub id"
MODEL_FILES = ["*.json", "*.jinja", "tokenizer.model"]  # beside the weights
TOWER_PIXELS = "preprocessor_config.json"
PAD_TOKEN = "<pad>"


def assemble(config: TrainingConfig) -> tuple[TokenPackerForConditionalGeneration | PeftModel, TokenPackerProcessor]:
    """Model and processor of a run, on the CPU, in training mode, with the right parts frozen.

    Raises:
        ValueError: for models that are not there or do not fit.
        ImportError: for LoRA without peft, and four bits without bitsandbytes.
    """
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    loader = _load_start if config.model.start is not None else _join_parts
    model, processor = loader(config, dtype)
    if learns_regions(config) and model.model.region_encoder is None:
        torch.manual_seed(config.seed)  # the region encoder's first weights
        add_regions(model, processor, rule=config.model.region_rule or DEFAULT_RULE)
    return unfreeze(model, config), processor


def unfreeze(
    model: TokenPackerForConditionalGeneration, config: TrainingConfig
) -> TokenPackerForConditionalGeneration | PeftModel:
    """The model with the parts that a run trains ready to learn, all else frozen. Raises ImportError as `assemble`."""
    model.requires_grad_(False)
    for part in config.train:
        for module in parts_of(model)[part]:
            module.to(torch.float32).requires_grad_(True)  # what learns needs more than bfloat16's three digits
    if config.liger:
        _use_liger(model)
    return model if config.lora is None else _with_lora(model, config.lora)


def check_models(model: ModelConfig) -> None:
    """Raises ValueError for models that are neither here nor can be on the hub, which is not asked."""
    names = [model.vision_tower, model.language_model] if model.start is None else [model.start]
    for name in names:
        check_name(name, REMEDY)
    if model.projector_weights is not None and not Path(model.projector_weights).is_file():
        raise ValueError(f"model.projector_weights={model.projector_weights} does not exist; check the path")


def parts_of(model: TokenPackerForConditionalGeneration) -> dict[str, list[torch.nn.Module]]:
    """The modules of each part; the head belongs to the language model, and a model may know no regions."""
    regions = model.model.region_encoder
    return {
        "vision_tower": [model.model.vision_tower],
        "projector": [model.model.multi_modal_projector],
        "regions": [] if regions is None else [regions],
        "language_model": [model.model.language_model, model.lm_head],
    }


def learns_regions(config: TrainingConfig) -> bool:
    """Whether the region encoder learns; a model without one is given one."""
    return "regions" in config.train


def load_processor(model: ModelConfig, *, with_regions: bool = False) -> TokenPackerProcessor:
    """The processor alone, without weights, for counting and checking.

    Args:
        with_regions: gives one that knows no regions the mark for them, as `assemble` will.
    """
    if model.start is None:
        processor = _processor(model_config(model), _tokenizer(model.language_model), model)
    else:
        folder = _start_folder(model.start, ["*.json", "*.jinja", "tokenizer.model"])
        processor = _with_settings(TokenPackerProcessor.from_pretrained(folder), model)
    return knowing_regions(processor, model.region_rule or DEFAULT_RULE) if with_regions else processor


def knowing_regions(processor: TokenPackerProcessor, rule: RegionRule = DEFAULT_RULE) -> TokenPackerProcessor:
    """The processor, with the mark of regions where it had none; as `assemble` makes it for a run that trains them."""
    if processor.region_token_id is None:
        processor.tokenizer = add_region_token(processor.tokenizer)
        processor.region_rule = rule
    return processor


def model_config(model: ModelConfig, *, with_regions: bool = False) -> TokenPackerConfig:
    """The config of the model that a run trains; no weights are read.

    Args:
        with_regions: adds a region encoder to one that has none.
    """
    config = _model_config(model)
    if with_regions and config.region_config is None:
        widths = {name: config.projector_config[name] for name in ("vision_dim", "language_dim", "num_levels")}
        config.region_config = RegionConfig(**widths).to_dict()
    return config


def _model_config(model: ModelConfig) -> TokenPackerConfig:
    if model.start is not None:
        return TokenPackerConfig.from_pretrained(_start_folder(model.start, ["config.json"]))
    trained = _trained_projector(model)
    vision, text = (_config_of(name) for name in (model.vision_tower, model.language_model))
    return TokenPackerConfig(
        getattr(vision, "vision_config", vision),
        text,
        projector_config=model.projector if trained is None else trained.config.to_dict(),
        vision_levels=list(model.vision_levels) or None,
    )


def _start_folder(start: str, files: list[str]) -> Path:
    """The folder of a model to continue from. Raises ValueError where there is none, or one of the original layout."""
    folder = fetch(start, files, REMEDY)
    if read_json(folder / "config.json").get("model_type") in MODEL_TYPES:
        raise ValueError(f"{start} is in the original layout; first run: tokenpacker convert {start} DST")
    return folder


def _load_start(
    config: TrainingConfig, dtype: torch.dtype
) -> tuple[TokenPackerForConditionalGeneration, TokenPackerProcessor]:
    start = config.model.start
    _start_folder(str(start), ["config.json"])  # before gigabytes of another kind are fetched
    folder = _with_weights(str(start))
    quantization = _quantization(config, KEPT_WHOLE)
    try:
        model, report = TokenPackerForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **quantization
        )
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"model.start={start} cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    model.name_or_path = start  # what an adapter names, whatever folder it was fetched to
    missing = sorted(report["missing_keys"])
    if missing:  # they would be trained from random numbers
        raise ValueError(f"model.start={start} lacks {len(missing)} weights of its config, such as {missing[0]}")
    return model, _with_settings(TokenPackerProcessor.from_pretrained(folder), config.model)


def _join_parts(
    config: TrainingConfig, dtype: torch.dtype
) -> tuple[TokenPackerForConditionalGeneration, TokenPackerProcessor]:
    settings = config.model
    tower = _load_tower(settings.vision_tower, dtype)
    language_model = AutoModelForCausalLM.from_pretrained(
        _with_weights(settings.language_model), dtype=dtype, **_quantization(config, ("lm_head",))
    )
    tokenizer = _tokenizer(settings.language_model)
    if len(tokenizer) > language_model.config.vocab_size:
        language_model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(config.seed)  # the projector's first weights
    trained = _trained_projector(settings)
    model = TokenPackerForConditionalGeneration.from_parts(
        tower,
        language_model,
        projector_config=settings.projector if trained is None else trained.config.to_dict(),
        vision_levels=list(settings.vision_levels) or None,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    if trained is not None:
        model.model.multi_modal_projector.load_state_dict(trained.state_dict())
    return model, _processor(model.config, tokenizer, settings)


def _trained_projector(model: ModelConfig) -> projectors.Projector | None:
    return None if model.projector_weights is None else projectors.load(model.projector_weights)


def _config_of(name: str) -> Any:
    """The config of a vision tower or language model. Raises ValueError where there is none."""
    folder = fetch(name, ["config.json"], REMEDY)
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} has no config of a model ({str(error).splitlines()[0][:120]}); {REMEDY}") from None


def _with_weights(name: str) -> Path:
    """The folder of a model with all its files; pickled weights are fetched only where there are no others."""
    folder = fetch(name, [*MODEL_FILES, "*.safetensors"], REMEDY)
    return folder if any(folder.glob("*.safetensors")) else fetch(name, [*MODEL_FILES, "pytorch_model*.bin"], REMEDY)


def _load_tower(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A vision tower; of a model for images and texts, its half for images."""
    kind, folder = _config_of(name).model_type, _with_weights(name)
    if kind == "clip":
        return CLIPVisionModel.from_pretrained(folder, dtype=dtype)
    whole = AutoModel.from_pretrained(folder, dtype=dtype)
    return getattr(whole, "vision_model", whole)


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The language model's tokenizer with an image mark; LLaMA's has room for it, others get one more token."""
    folder = fetch(name, ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "config.json"], REMEDY)
    if (folder / "tokenizer.model").is_file() and read_json(folder / "config.json").get("model_type") == "llama":
        return load_llama_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token in (None, tokenizer.eos_token):  # an end that is padding would never be learned
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def _processor(config: Any, tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> TokenPackerProcessor:
    """The processor of joined parts; pixels are normalised as the vision tower was trained, CLIP's way by default."""
    path = fetch(model.vision_tower, [TOWER_PIXELS], REMEDY) / TOWER_PIXELS
    found = read_json(path) if path.is_file() else {}
    pixels = {name: found[name] for name in ("image_mean", "image_std") if name in found}
    return _with_settings(TokenPackerProcessor.from_config(config, tokenizer, **pixels), model)


def _with_settings(processor: TokenPackerProcessor, model: ModelConfig) -> TokenPackerProcessor:
    """The processor with what the run sets of image rules and chat format; the trained model will keep it."""
    for name in ("image_mode", "max_tiles", "grid_list", "thumbnail_source", "antialias"):
        if getattr(model, name) is not None:
            setattr(processor.image_processor, name, getattr(model, name))
    if model.row_separator is not None:
        processor.row_separator = model.row_separator
    if model.region_rule is not None:
        processor.region_rule = model.region_rule
    processor.chat_template = chat_template(format=model.chat_format)
    return processor


def _quantization(config: TrainingConfig, kept: tuple[str, ...]) -> dict[str, Any]:
    if config.lora is None or not config.lora.four_bit:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("lora.four_bit needs bitsandbytes; run: pip install bitsandbytes")
    return {"quantization_config": four_bit_config(llm_int8_skip_modules=list(kept))}


def _use_liger(model: TokenPackerForConditionalGeneration) -> None:
    """Liger's kernels in the language model; the Trainer knows the whole model's type only, and would use none."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise ImportError("liger=true needs liger-kernel; run: pip install liger-kernel")
    if not torch.accelerator.is_available():
        raise ValueError("liger=true needs a GPU, for its kernels are Triton's; leave it out")
    from liger_kernel.transformers import monkey_patch

    language_model = model.model.language_model
    apply = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(language_model.config.model_type)
    if apply is None:
        raise ValueError(f"liger=true has no kernels for {language_model.config.model_type}; leave it out")
    apply(model=language_model, cross_entropy=False, fused_linear_cross_entropy=False)  # the loss is the whole model's


def _with_lora(model: TokenPackerForConditionalGeneration, lora: LoraConfig) -> PeftModel:
    """The model with updates beside its language model's layers; the projector learns as it is."""
    try:
        from peft import LoraConfig as PeftLoraConfig
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft; run: pip install 'tokenpacker[train]'") from error
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = "|".join(LORA_LAYERS)
    wrapped = get_peft_model(
        model,
        PeftLoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=rf"model\.language_model\..*\.({layers})",
        ),
    )
    for parameter in trained:  # peft freezes all but its own
        parameter.requires_grad_(True)
    return wrapped


def merged_model(config: TrainingConfig, learned: Mapping[str, torch.Tensor]) -> TokenPackerForConditionalGeneration:
    """The model that a LoRA run made, loaded anew and whole, with its updates in its weights.

    The weights that were trained beside may be in four bits or spread over processes: into those nothing is merged.

    Args:
        learned: updates and all else that learned, by its names in the run's model.
    """
    assert config.lora is not None
    model, _ = assemble(replace(config, lora=replace(config.lora, four_bit=False)))
    unknown = model.load_state_dict(learned, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"{unknown[0]} was learned and is not in the model; load the adapter beside it instead")
    return model.merge_and_unload()


def save_projector(
    model: TokenPackerForConditionalGeneration, path: Path, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Writes the projector's weights alone, as stage 1 keeps them.

    Args:
        weights: of the whole model, gathered, where processes share them; None takes the model's own.
    """
    prefix = "model.multi_modal_projector."
    if weights is None:
        projector = model.model.multi_modal_projector.state_dict()
    else:
        projector = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    projectors.save(model.config.projector, projector, path)
