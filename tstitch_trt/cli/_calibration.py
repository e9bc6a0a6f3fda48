"""What a calibration of a bundle tells the engine that serves it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tstitch_trt.runtime.runtime import Runtime
    from tstitch_trt.serve.costs import CostPoint

__all__ = ["calibrated_steps"]


def calibrated_steps(runtime: Runtime) -> list[CostPoint]:
    """The steps of the calibration that holds for this runtime; none, and a line in the log, where there is none."""
    import logging

    from tstitch_engines.errors import NotCalibrated
    from tstitch_trt.serve.costs import CostPoint
    from tstitch_trt.study.budget.conditions import Conditions, find_calibration

    try:
        calibration = find_calibration(runtime.bundle, Conditions.here(runtime.setup))
    except NotCalibrated as error:
        logging.getLogger(__name__).info("%s; step costs are learned. %s", error.message, error.hint)
        return []
    return [
        CostPoint(step.member, step.guided, (step.height, step.width), step.batch, step.ms / 1e3)
        for step in calibration.steps
    ]
