"""One graph to files of a runtime, by transformers' exporters and quantizers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenpacker.export.graphs import Graph
from tokenpacker.export.manifest import Quantization, Runtime

if TYPE_CHECKING:
    import onnx_ir

    from tokenpacker.export.onnx_files import SharedWeights

QUANTIZED = "_quantized"  # ending of file names; transformers.js looks for it with dtype "q8"


class OnnxWriter:
    """Writes graphs as ONNX. The vision encoders of all scale factors share the files of large weights.

    int8 is ONNX Runtime's dynamic quantization: activations are rounded as they come, which needs no calibration.
    """

    def __init__(self, quantize: Quantization | None, folder: Path, external_bytes: int):
        from transformers.exporters import OnnxExporter

        self.exporter = OnnxExporter()
        self.quantize = quantize
        self.folder, self.external_bytes = folder, external_bytes
        self.suffix = (QUANTIZED if quantize else "") + ".onnx"
        self.shared: dict[str, SharedWeights] = {}  # by the graphs' module class

    def write(self, graph: Graph) -> str:
        """Writes a graph and returns its file's name."""
        import onnx_ir
        from transformers.exporters import OnnxConfig

        from tokenpacker.export.onnx_files import SharedWeights, name_dimensions, weight_bytes

        config = OnnxConfig(**_tracing(graph))
        program = self.exporter.export(graph.module, dict(graph.inputs), config).program
        if self.quantize:
            program = _in_int8(program, graph)
        name_dimensions(program, graph)
        path = self.folder / f"{graph.name}{self.suffix}"
        if weight_bytes(program) >= self.external_bytes:
            self.shared.setdefault(type(graph.module).__name__, SharedWeights(path)).move(program)
        onnx_ir.save(program, path)
        return path.name


def _in_int8(program: onnx_ir.Model, graph: Graph) -> onnx_ir.Model:
    """The graph with rounded weights, one scale for each output of a matrix.

    Left as they are: weights of several matrices (folded attention heads), for which ONNX Runtime has no such kernel,
    and convolutions, whose integer kernels are slow, and which are a thousandth of the work.
    """
    from onnxruntime.quantization import QuantType
    from transformers.exporters import ExportFormat, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    weights = program.graph.initializers
    several = [
        node.name
        for node in program.graph
        if any(value is not None and value.name in weights and len(value.shape or ()) > 2 for value in node.inputs)
    ]
    config = OnnxRuntimeDynamicConfig(
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=[name for name in several if name is not None],
    )
    return OnnxRuntimeQuantizer(config).quantize(program, graph.inputs, ExportFormat.ONNX)


class OpenVinoWriter:
    """Writes graphs as OpenVINO's IR, the weights of each in a file of its own.

    int8 is NNCF's compression of weights, which are expanded as they are used: activations are not rounded.
    """

    def __init__(self, quantize: Quantization | None, folder: Path):
        from transformers.exporters import NNCFOpenVINOQuantizer, NNCFWeightCompressionConfig, OpenVINOExporter

        self.exporter = OpenVINOExporter()
        self.folder = folder
        self.suffix = (QUANTIZED if quantize else "") + ".xml"
        self.quantizer = NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig()) if quantize else None

    def write(self, graph: Graph) -> str:
        """Writes a graph and returns its file's name."""
        from transformers.exporters import OpenVINOConfig

        config = OpenVINOConfig(quantizer=self.quantizer, stateful=False, **_tracing(graph))
        program = self.exporter.export(graph.module, dict(graph.inputs), config).program
        path = self.folder / f"{graph.name}{self.suffix}"
        self.exporter.save_program(program, path)
        return path.name


def make_writer(to: Runtime, quantize: Quantization | None, folder: Path, external_bytes: int) -> Any:
    """The writer of a runtime's files, which go to `folder`. Raises ImportError for a package that is too old."""
    folder.mkdir()
    try:
        if to == "onnx":
            return OnnxWriter(quantize, folder, external_bytes)
        return OpenVinoWriter(quantize, folder)
    except ImportError as error:  # transformers' own message, with the version that it wants
        raise ImportError(f"exporting to {to} is not possible: {error}") from error


def _tracing(graph: Graph) -> dict[str, Any]:
    return {"dynamic_shapes": graph.dynamic_shapes(), "prefer_deferred_runtime_asserts_over_guards": True}
