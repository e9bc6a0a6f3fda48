"""How numbers, settings and metrics are written in a report."""

from __future__ import annotations

from itertools import groupby
from typing import Final

from tstitch_trt.study.machine import Machine
from tstitch_trt.study.records import LOWER_IS_BETTER, Measure, Setting, Study

__all__ = [
    "METRIC_NAMES", "better", "date", "family_of", "interval", "machine_text", "metric_axis", "ms",
    "order_of",
]  # fmt: skip

METRIC_NAMES: Final = {
    "fid": "Fréchet distance",
    "kid": "Kernel distance",
    "lpips": "LPIPS",
    "latent_error": "Latent error",
    "precision": "Precision",
    "recall": "Recall",
    "accuracy": "Accuracy",
    "psnr": "PSNR (dB)",
    "clip": "CLIP score",
}


def better(metric: str) -> str:
    return "lower is better" if metric in LOWER_IS_BETTER else "higher is better"


def metric_axis(metric: str) -> str:
    return f"{METRIC_NAMES.get(metric, metric)} ({better(metric)})"


def ms(value: float) -> str:
    """Milliseconds with three significant digits: ``0.123``, ``12.3``, ``1,230``."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def interval(measure: Measure) -> str:
    """``18.20 [17.90, 18.50]``."""
    digits = 0 if abs(measure.value) >= 1000 else 2 if abs(measure.value) >= 10 else 3
    return f"{measure.value:.{digits}f} [{measure.low:.{digits}f}, {measure.high:.{digits}f}]"


def date(study: Study) -> str:
    """``2024-01-02 03:04 UTC``."""
    return f"{study.made[:10]} {study.made[11:16]} UTC"


def order_of(setting: Setting) -> tuple[str, ...]:
    """The members in the order of their segments: ``("small", "large")``."""
    names = (part.strip().partition(":")[0].partition("@")[0] for part in setting.schedule.split(","))
    return tuple(name for name, _ in groupby(names))


def family_of(setting: Setting) -> str:
    """What a setting is one of: ``small → large, 50 ddim steps``, or ``large alone, ddim`` for any number of steps."""
    order = order_of(setting)
    guided = "" if setting.guidance == 1 else f", guidance {setting.guidance:g}"
    if len(order) == 1:
        return f"{order[0]} alone, {setting.solver}{guided}"
    return f"{' → '.join(order)}, {setting.steps} {setting.solver} steps{guided}"


def machine_text(machine: Machine) -> str:
    gpus = f", {', '.join(machine.gpus)}" if machine.gpus else ""
    return f"{machine.processor}, {machine.cores} cores{gpus}"
