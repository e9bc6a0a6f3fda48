"""What sampling costs on this machine, and the best schedule that fits in a budget.

here = Conditions.here(runtime.setup)
calibration = find_calibration(runtime.bundle, here)    the one that holds here, never one of another machine
predict_ms(calibration, plan, batch=8)
"""

from __future__ import annotations

from tstitch_trt.study.budget.choose import StudyChooser
from tstitch_trt.study.budget.conditions import Conditions, find_calibration
from tstitch_trt.study.budget.cost_model import Costs
from tstitch_trt.study.budget.predict import predict_ms

__all__ = ["Conditions", "Costs", "StudyChooser", "find_calibration", "predict_ms"]
