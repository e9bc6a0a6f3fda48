"""8-bit copies of ONNX graphs, made in a process of their own."""
