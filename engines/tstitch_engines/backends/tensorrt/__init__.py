"""TensorRT 10 and 11 and TensorRT-RTX: one backend, and a record of what really differs (``flavour``).

Compiling works in a child process (``child`` here, ``worker`` there), without a GPU for TensorRT-RTX only. Loading and
running (``engine``, ``kernel_cache``) were not run on a GPU.
"""

from tstitch_engines.backends.tensorrt.backend import TensorRtBackend, open_tensorrt, open_tensorrt_rtx
from tstitch_engines.backends.tensorrt.plan_header import PlanHeader, read_plan_header

__all__ = ["PlanHeader", "TensorRtBackend", "open_tensorrt", "open_tensorrt_rtx", "read_plan_header"]
