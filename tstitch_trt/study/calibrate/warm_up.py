"""Running a schedule before it is timed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tstitch_trt.runtime.chooser import ChosenSchedule
from tstitch_trt.study.calibrate.trials import Bucket, alternating

if TYPE_CHECKING:
    from tstitch_trt.runtime.runtime import Runtime

__all__ = ["warm_up"]


def warm_up(runtime: Runtime, budget: ChosenSchedule) -> None:
    """Runs a step of each kind that ``budget`` chose, once: a network's first run at a new size takes longer.

    What was calibrated is a runtime that has run before, as a server's has.
    """
    plan = runtime.plan(**budget.settings)
    guided = any(plan.guided)
    names = list(dict.fromkeys(plan.schedule.names))
    for images in dict.fromkeys(runtime.splitting.chunks(budget.images, guided=guided)):
        bucket = Bucket(images, budget.size, guided)
        alternating(runtime, bucket, names, len(names), guidance=budget.settings.get("guidance")).run(runtime)
