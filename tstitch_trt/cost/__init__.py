"""What sampling costs on this machine, measured once, and the best schedule that fits in a budget.

tstitch_trt.cost.calibrate(runtime)             time = sum of member steps + overhead, measured and checked
tstitch_trt.cost.current_calibration(runtime)   the one that holds here, never one of another machine
tstitch_trt.cost.predict_ms(calibration, plan, batch=8)
"""

from __future__ import annotations

from tstitch_trt.cost.budget import Budget, Costs
from tstitch_trt.cost.calibrate import calibrate, default_batches
from tstitch_trt.cost.candidates import keywords_of
from tstitch_trt.cost.conditions import Conditions, current_calibration
from tstitch_trt.cost.predict import predict_ms

__all__ = [
    "Budget",
    "Conditions",
    "Costs",
    "calibrate",
    "current_calibration",
    "default_batches",
    "keywords_of",
    "predict_ms",
]
