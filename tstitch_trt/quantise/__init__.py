"""8-bit bundles: calibration data, quantisation and the loss it costs."""
