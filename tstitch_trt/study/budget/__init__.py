"""What sampling costs on this machine, and the best schedule that fits in a budget."""

from __future__ import annotations

from tstitch_trt.study.budget.choose import StudyChooser
from tstitch_trt.study.budget.conditions import Conditions, find_calibration
from tstitch_trt.study.budget.cost_model import Costs
from tstitch_trt.study.budget.predict import predict_ms

__all__ = ["Conditions", "Costs", "StudyChooser", "find_calibration", "predict_ms"]
