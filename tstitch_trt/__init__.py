"""T-Stitch as a compiled engine: a small denoiser takes the early diffusion steps, the large one the late ones.

    import tstitch_trt

    with tstitch_trt.load("fashion.bundle") as runtime:
        result = runtime.sample(labels=[3, 5], fraction=0.4, seed=0)

Importing this package loads numpy and nothing heavier; engines' libraries load with the bundle that needs them.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from tstitch_engines.errors import TStitchError
from tstitch_trt.pipeline.accelerate import accelerate
from tstitch_trt.plan.plan import Plan, make_plan
from tstitch_trt.plan.schedule import Schedule, Segment
from tstitch_trt.runtime.load import load
from tstitch_trt.runtime.result import Result, SegmentTiming, StepEvent
from tstitch_trt.runtime.runtime import Runtime

__all__ = [
    "Plan",
    "Result",
    "Runtime",
    "Schedule",
    "Segment",
    "SegmentTiming",
    "StepEvent",
    "TStitchError",
    "__version__",
    "accelerate",
    "load",
    "make_plan",
]

try:
    __version__ = version("tstitch-trt")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"
