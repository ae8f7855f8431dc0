"""Writes a model as graphs of ONNX or OpenVINO, in a folder that appears when it is complete."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

import tokenpacker
from tokenpacker.checkpoints.model_folder import new_folder
from tokenpacker.export.graphs import head_dim, key_value_heads, plain_attention, text_graphs, vision_graphs
from tokenpacker.export.manifest import Manifest, Quantization, Runtime, describe_files
from tokenpacker.export.writers import make_writer
from tokenpacker.hf.processing.scale_factors import own_scale_factor
from tokenpacker.hf.versions import HAS_EXPORTERS
from tokenpacker.projectors import ProjectorConfig

if TYPE_CHECKING:
    from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor

NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
EXTERNAL_BYTES = 1_000_000_000  # of a graph's weights; protobuf ends at 2 GB, and copies of a large file cost memory


def export_model(
    model: TokenPackerForConditionalGeneration,
    processor: TokenPackerProcessor,
    output_dir: Path | str,
    *,
    to: Runtime,
    quantize: Quantization | None = None,
    scale_factors: Sequence[int] | None = None,
    overwrite: bool = False,
    sources: Sequence[Path] = (),
    external_bytes: int = EXTERNAL_BYTES,
    progress: Callable[[int, int, str], None] | None = None,
) -> Manifest:
    """Writes a model's graphs, config and processor into `output_dir`, and returns what was written.

    No other thread may use transformers meanwhile: its exporters replace functions for as long as they trace. A region
    encoder is left out.

    Args:
        model: in float32 on the CPU.
        quantize: `int8` rounds the weights of matrix products and embeddings to 8 bits.
        scale_factors: those that images can be packed with; the projector's own is the default of the export, else the
            first. None takes the projector's own alone.
        overwrite: replace a model's folder that is there, once the new one is complete.
        sources: folders that the model was read from; `output_dir` may hold none of them.
        external_bytes: ONNX weights of at least this size are stored beside their graph.
        progress: gets the number of finished graphs, the number of all, and the name of the next one.

    Raises:
        ValueError: for a place that is taken or holds a source, scale factors that do not fit the model, a quantized
            model, and another type or device than float32 on the CPU.
        ImportError: for a package that is missing or too old.
    """
    require_packages(to, quantize)
    config = model.config
    factors = check_scale_factors(config.projector, config.patch_grid, scale_factors)
    check_precision(model)
    weights = 4 * sum(weight.numel() for weight in model.parameters())
    copies = len(factors) + (2 if quantize else 1)  # at most: the vision encoder for each factor, and temporary files
    with new_folder(Path(output_dir), copies * weights, overwrite, sources) as folder:
        writer = make_writer(to, quantize, folder / to, external_bytes)
        names: list[str] = []
        with plain_attention(model), torch.no_grad():
            for graph in (*vision_graphs(model, factors), *text_graphs(model)):
                if progress is not None:
                    progress(len(names), len(factors) + 2, graph.name)
                names.append(f"{to}/{writer.write(graph)}")
        *vision, embed, decoder = names
        _write_processor(model, processor, folder)
        text = config.text_config
        manifest = Manifest(
            tokenpacker=tokenpacker.__version__,
            transformers=transformers.__version__,
            runtime=to,
            quantization=quantize,
            image_token_id=config.image_token_id,
            max_positions=getattr(text, "max_position_embeddings", None),
            vision_encoders=[{"scale_factor": s, "file": file} for s, file in zip(factors, vision, strict=True)],
            embed_tokens=embed,
            decoder=decoder,
            cache={"layers": text.num_hidden_layers, "heads": key_value_heads(text), "head_dim": head_dim(text)},
            files=describe_files(folder),
        )
        manifest.write(folder)
    return manifest


def require_packages(to: Runtime, quantize: Quantization | None = None) -> None:
    """Raises ImportError for a package that is missing, and for a version of transformers without exporters."""
    needed = NEEDED[to] + (("nncf",) if to == "openvino" and quantize else ())
    for package in needed:
        if find_spec(package) is None:
            raise ImportError(f"exporting to {to} needs {package}; run: pip install 'tokenpacker[export]'")
    if not HAS_EXPORTERS:
        raise ImportError(
            f"exporting needs transformers 5.24 or later, but {transformers.__version__} is installed; run: pip install"
            " -U transformers"
        )


def check_scale_factors(
    projector: ProjectorConfig, patch_grid: tuple[int, int], scale_factors: Sequence[int] | None
) -> list[int | None]:
    """The scale factors to export, the default first; None stands for a projector whose tokens have none.

    Raises:
        ValueError: for a scale factor that the projector cannot have on this grid, or that is given twice.
    """
    own = own_scale_factor(projector, patch_grid)
    if scale_factors is None:
        return [own]
    for factor in scale_factors:
        projector.token_grid(patch_grid, factor)
        if scale_factors.count(factor) > 1:
            raise ValueError(f"scale factor {factor} is given twice; give each one once")
    return sorted(scale_factors, key=lambda factor: factor != own)


def check_precision(model: TokenPackerForConditionalGeneration) -> None:
    """Raises ValueError for a quantized model, and for weights that are not float32 on the CPU."""
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the model is quantized and cannot be exported; export the original one, with int8 if wanted")
    for name, weight in model.named_parameters():
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise ValueError(
                f"{name} is {weight.dtype} on {weight.device}, but a model is exported from float32 on the CPU; load it"
                " with dtype=torch.float32"
            )


def _write_processor(model: TokenPackerForConditionalGeneration, processor: TokenPackerProcessor, folder: Path) -> None:
    """Writes the processor and the configs, with what transformers.js looks for in `config.json`."""
    processor.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["image_token_index"] = model.config.image_token_id  # its name in the class of LLaVA
    graphs = {file.name: len(list(file.parent.glob(f"{file.name}_data*"))) for file in folder.glob("onnx/*.onnx")}
    data_files = {name: count for name, count in graphs.items() if count}
    if data_files:
        config["transformers.js_config"] = {"use_external_data_format": data_files}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
