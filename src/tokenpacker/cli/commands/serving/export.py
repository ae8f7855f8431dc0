"""`tokenpacker export`: a model as graphs for ONNX Runtime, OpenVINO or a browser."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument

from tokenpacker.cli import options
from tokenpacker.cli.arguments import refuse, require_free, whole_numbers
from tokenpacker.cli.errors import keeping, sigterm_as_ctrl_c
from tokenpacker.cli.loading import load_model, quiet_exporters
from tokenpacker.cli.model_files import Geometry, find_model, read_json
from tokenpacker.cli.options import flag, number, value
from tokenpacker.cli.output import print_note, print_result
from tokenpacker.places import check_apart
from tokenpacker.progress import Progress

if TYPE_CHECKING:
    from tokenpacker.export import Agreement
    from tokenpacker.hf import TokenPackerForConditionalGeneration

QUESTIONS = 48
REGIONS_STAY = "the region encoder is not exported: the graphs answer questions about images, not about <mask>"


def export(
    model: Annotated[str, Argument(metavar="MODEL", help="Folder, hub id or name in `models`.")],
    out: Annotated[Path, Argument(metavar="OUT", help="Folder to write; it appears when it is complete.")],
    to: Annotated[Literal["onnx", "openvino"], value("RUNTIME", "onnx or openvino.")],
    scale_factor: Annotated[str | None, value("S,S", "Scale factors to choose from later.", "model's")] = None,
    quantize: Annotated[Literal["int8"] | None, value("TYPE", "int8.", "float32")] = None,
    check: Annotated[bool, flag("--check", "Ask torch and the export the same questions.")] = False,
    questions: Annotated[int | None, number("Questions of --check.", str(QUESTIONS))] = None,
    overwrite: Annotated[bool, flag("--overwrite", "Replace OUT, once the new folder is complete.")] = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Write graphs for ONNX Runtime, transformers.js or OpenVINO.

    Examples:
        tokenpacker export tiny tiny-onnx --to onnx --scale-factor 2,3,4 --check
        tokenpacker export FOLDER OUT --to openvino --quantize int8
    """
    factors = whole_numbers("--scale-factor", scale_factor) if scale_factor is not None else None
    if not check:
        refuse({"--questions": questions}, "belongs to --check; give both, or leave it out")
    require_free(out, overwrite, model)
    folder = find_model(model)
    check_apart(out, [folder])  # a model from the hub or of this package has another name than its folder
    if read_json(folder / "config.json").get("quantization_config") is not None:
        raise ValueError(f"model {model} is quantized and cannot be exported; give the original, with --quantize int8")
    geometry = Geometry.of_model(folder)
    # OpenVINO's converter and NNCF would send statistics of use without asking, but for these variables.
    os.environ.setdefault("CI", "true")
    os.environ.setdefault("NNCF_CI", "1")
    from tokenpacker.export.exporting import check_scale_factors, export_model, require_packages

    require_packages(to, quantize)
    total = len(check_scale_factors(geometry.projector, geometry.patch_grid, factors)) + 2
    loaded, processor = load_model(model, verbose, "cpu", "float32")
    kept = keeping(f"nothing is kept, for {out} appears when it is complete; call it again to start anew")
    with kept, sigterm_as_ctrl_c(), quiet_exporters(verbose), Progress(f"{model} to {out}", total) as shown:
        manifest = export_model(
            loaded,
            processor,
            out,
            to=to,
            quantize=quantize,
            scale_factors=factors,
            overwrite=overwrite,
            sources=[folder],
            progress=lambda done, total, name: shown.update(done, name, total=total),
        )
    if loaded.config.region_config is not None:
        print_note(f"note: {REGIONS_STAY}")
    agreement = _compare(loaded, out, questions or QUESTIONS) if check else None
    known = [str(factor) for factor in manifest.scale_factors if factor is not None]
    text = f"{out}: {total} graphs for {to}, {quantize or 'float32'}, {manifest.total_bytes() / 1e6:,.1f} MB"
    text += f"; scale factors {', '.join(known)}" if known else ""
    text += f"\n{agreement.summary()}" if agreement else ""
    result: dict[str, Any] = {
        "model": model,
        "out": str(out),
        "to": to,
        "quantize": quantize,
        "scale_factors": manifest.scale_factors,
    }
    result |= {"bytes": manifest.total_bytes(), "check": agreement and agreement.to_dict()}
    print_result(as_json, result, text)


def _compare(model: TokenPackerForConditionalGeneration, out: Path, questions: int) -> Agreement:
    from tokenpacker.export import ExportedAnswerer, compare_answers

    with keeping(f"{out} is complete, but not all questions were asked"), Progress("checking", questions) as shown:
        return compare_answers(model, ExportedAnswerer(out), questions, shown.update)
