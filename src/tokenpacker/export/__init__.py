"""Models as graphs for other runtimes: ONNX Runtime, OpenVINO, a browser."""
