"""Where memory lives and work runs: buffers, streams, graphs and step kernels, on the host and on CUDA."""
