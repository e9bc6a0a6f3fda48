"""T-Stitch as a compiled engine: a small denoiser takes the early diffusion steps, the large one the late ones.

    import tstitch_trt

    with tstitch_trt.load("fashion.bundle") as runtime:
        result = runtime.sample(labels=[3, 5], fraction=0.4, seed=0)

Importing this package loads numpy and nothing heavier; engines' libraries load with the bundle that needs them.
"""

from __future__ import annotations

import tstitch_trt.start  # noqa: F401 - before all that takes time

# isort: split
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.errors import (
    BadBundle,
    BadCheckpoint,
    BadEngine,
    BadInput,
    BadSchedule,
    BuildFailed,
    Busy,
    Cancelled,
    Closed,
    DeviceLost,
    FailedWork,
    NotCalibrated,
    NotFinite,
    OutOfMemory,
    OutOfProfile,
    OutOfTime,
    Overloaded,
    PairMismatch,
    TStitchError,
    Unavailable,
    UnknownName,
    Unsafe,
    Untrusted,
)
from tstitch_engines.version import VERSION
from tstitch_trt.pipeline.accelerate import accelerate as _accelerate
from tstitch_trt.plan.plan import Plan, make_plan
from tstitch_trt.plan.schedule import Schedule, Segment
from tstitch_trt.runtime.chooser import ScheduleChooser, Setup
from tstitch_trt.runtime.load import load as _load
from tstitch_trt.runtime.result import FailedImage, Result, SegmentTiming, StepEvent
from tstitch_trt.runtime.runtime import Runtime

__all__ = [
    "BadBundle",
    "BadCheckpoint",
    "BadEngine",
    "BadInput",
    "BadSchedule",
    "BuildFailed",
    "Busy",
    "Cancelled",
    "Closed",
    "DeviceLost",
    "FailedImage",
    "FailedWork",
    "NotCalibrated",
    "NotFinite",
    "OutOfMemory",
    "OutOfProfile",
    "OutOfTime",
    "Overloaded",
    "PairMismatch",
    "Plan",
    "Result",
    "Runtime",
    "Schedule",
    "Segment",
    "SegmentTiming",
    "StepEvent",
    "TStitchError",
    "Unavailable",
    "UnknownName",
    "Unsafe",
    "Untrusted",
    "__version__",
    "accelerate",
    "load",
    "make_plan",
]

P = ParamSpec("P")
T = TypeVar("T")


def _study_chooser(bundle: Bundle, setup: Setup) -> ScheduleChooser:
    from tstitch_trt.study.budget.choose import StudyChooser

    return StudyChooser(bundle, setup)


def _with_budgets(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, whose ``chooser`` is by default the one that reads the bundle's calibration and studies."""

    @wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> T:
        keywords.setdefault("chooser", _study_chooser)
        return function(*args, **keywords)

    return call


accelerate = _with_budgets(_accelerate)
load = _with_budgets(_load)

__version__ = VERSION
