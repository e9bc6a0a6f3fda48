"""Serving: the steps of many requests in shared batches, over HTTP and past one machine.

from tstitch_trt.serve import Engine

with Engine("fashion.bundle") as engine:
    handles = [engine.submit(labels=[label], fraction=0.4) for label in range(10)]
    images = [handle.result().images for handle in handles]
"""

from tstitch_trt.serve.admission import Cheaper
from tstitch_trt.serve.costs import CostPoint
from tstitch_trt.serve.engine import Engine
from tstitch_trt.serve.handle import Handle, LaneEvent, Times
from tstitch_trt.serve.observer import EngineState, ModelState, Observer, TickInfo
from tstitch_trt.serve.policy import DeadlineFirst, FirstCome

__all__ = [
    "Cheaper",
    "CostPoint",
    "DeadlineFirst",
    "Engine",
    "EngineState",
    "FirstCome",
    "Handle",
    "LaneEvent",
    "ModelState",
    "Observer",
    "TickInfo",
    "Times",
]
