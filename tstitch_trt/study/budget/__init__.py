"""What sampling costs on this machine, measured once, and the best schedule that fits in a budget.

tstitch_trt.study.calibrate.calibrate(runtime)             time = sum of member steps + overhead, measured and checked
tstitch_trt.study.budget.current_calibration(runtime)   the one that holds here, never one of another machine
tstitch_trt.study.budget.predict_ms(calibration, plan, batch=8)
"""

from __future__ import annotations

from tstitch_trt.study.budget.candidates import keywords_of
from tstitch_trt.study.budget.conditions import Conditions, current_calibration
from tstitch_trt.study.budget.cost_model import Costs
from tstitch_trt.study.budget.predict import predict_ms
from tstitch_trt.study.budget.record import Budget
from tstitch_trt.study.calibrate.calibrate import calibrate, default_batches

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
