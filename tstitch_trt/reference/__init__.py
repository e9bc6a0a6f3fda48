"""Networks on ONNX Runtime and PyTorch, and inputs to compare them on."""
