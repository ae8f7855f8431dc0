"""ONNX graphs to files: names of dynamic dimensions, and large weights beside the graphs, each stored once.

Protobuf limits a file to 2 GB. Larger weights go to `NAME.onnx_data`, further ones to `NAME.onnx_data_1` and so on, as
transformers.js looks for them. Graphs of one group, such as the vision encoder at several scale factors, read the same
data files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir

from tokenpacker.export.graphs import Graph

ALIGNMENT = 4096  # bytes, so that a runtime can map a weight into memory
CHUNK_BYTES = 2_000_000_000  # largest data file; browsers hold no larger buffer


def name_dimensions(program: onnx_ir.Model, graph: Graph) -> None:
    """Gives the dynamic dimensions of inputs and outputs their names, in place of those that torch numbered."""
    for value in [*program.graph.inputs, *program.graph.outputs]:
        assert value.name is not None
        assert value.shape is not None
        named = graph.axes[value.name]
        value.shape = onnx_ir.Shape([named.get(axis, size) for axis, size in enumerate(value.shape)])
    for node in program.graph.all_nodes():
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None  # it says the old names; runtimes infer it


def weight_bytes(program: onnx_ir.Model) -> int:
    """The size of a graph's weights."""
    return sum(value.const_value.nbytes for value in program.graph.initializers.values() if value.const_value)


class SharedWeights:
    """Data files that graphs of one group read their weights from. Equal weights are stored once.

    Args:
        first: path of the group's first graph, whose name the data files have.
        chunk_bytes: largest data file; a weight that is larger has a file of its own.
    """

    def __init__(self, first: Path, chunk_bytes: int = CHUNK_BYTES):
        self.first, self.chunk_bytes = first, chunk_bytes
        self.places: dict[bytes, tuple[str, int]] = {}  # digest -> file and offset
        self.sizes: list[int] = []  # of the data files

    def move(self, program: onnx_ir.Model, least_bytes: int = 1024) -> list[str]:
        """Moves weights of at least `least_bytes` into the data files, and returns the files that the graph reads."""
        read = set()
        for value in program.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < least_bytes:
                continue
            data = tensor.tobytes()
            digest = hashlib.sha256(data).digest()
            if digest not in self.places:
                self.places[digest] = self._append(data)
            file, offset = self.places[digest]
            read.add(file)
            shape, folder = onnx_ir.Shape(tensor.shape.numpy()), self.first.parent
            value.const_value = onnx_ir.ExternalTensor(
                file, offset, len(data), tensor.dtype, shape=shape, name=value.name or "", base_dir=folder
            )
        return sorted(read)

    def _append(self, data: bytes) -> tuple[str, int]:
        if not self.sizes or (self.sizes[-1] and self.sizes[-1] + len(data) > self.chunk_bytes):
            self.sizes.append(0)
        number, offset = len(self.sizes) - 1, -(-self.sizes[-1] // ALIGNMENT) * ALIGNMENT
        name = f"{self.first.name}_data" + (f"_{number}" if number else "")
        with open(self.first.with_name(name), "ab") as file:
            file.truncate(offset)
            file.write(data)
        self.sizes[-1] = offset + len(data)
        return name, offset
