"""TensorRT 10 and 11 and TensorRT-RTX: one backend, and a record of what really differs (``flavour``).

Compiling works in a child process (``child`` here, ``worker`` there); on a machine without a GPU it does so for
TensorRT-RTX only. Nothing here has run an engine on a GPU: loading and running (``engine``, ``kernel_cache``) were
written on a machine that has none.
"""

from tstitch_engines.backends.tensorrt.backend import TensorRtBackend, open_tensorrt, open_tensorrt_rtx
from tstitch_engines.backends.tensorrt.plan_header import PlanHeader, read_plan_header

__all__ = ["PlanHeader", "TensorRtBackend", "open_tensorrt", "open_tensorrt_rtx", "read_plan_header"]
