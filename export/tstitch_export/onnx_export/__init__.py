"""From a PyTorch module to a checked ONNX graph whose weights are read from the checkpoint files."""
