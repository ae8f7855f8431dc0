"""Models as graphs for other runtimes: ONNX Runtime, OpenVINO, a browser.

`export_model` writes a folder, `ExportedAnswerer` answers from it without torch's model, `compare_answers` holds both
beside each other.
"""

from tokenpacker.export.agreement import Agreement, compare_answers
from tokenpacker.export.answerer import ExportedAnswerer
from tokenpacker.export.exporting import export_model
from tokenpacker.export.manifest import Manifest

__all__ = ["Agreement", "ExportedAnswerer", "Manifest", "compare_answers", "export_model"]
