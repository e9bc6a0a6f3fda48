"""The difference of two results."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["Error", "measure_error"]


class Error(msgspec.Struct, frozen=True, kw_only=True):
    """``max_abs``: largest difference; ``max_rel``: its share of the reference's largest magnitude; ``rel_l2``: norm of
    the difference over norm of the reference. All ``None`` where one side has NaN or infinity that the other has not.
    """

    max_abs: float | None
    max_rel: float | None
    rel_l2: float | None

    def within(self, limit: float) -> bool:
        """Whether both relative figures are at most ``limit``."""
        return self.max_rel is not None and self.rel_l2 is not None and max(self.max_rel, self.rel_l2) <= limit

    def worse(self, other: Error) -> Error:
        """The larger of each figure."""
        ours, theirs = (self.max_abs, self.max_rel, self.rel_l2), (other.max_abs, other.max_rel, other.rel_l2)
        absolute, relative, l2 = (
            None if a is None or b is None else max(a, b) for a, b in zip(ours, theirs, strict=True)
        )
        return Error(max_abs=absolute, max_rel=relative, rel_l2=l2)

    def __str__(self) -> str:
        if self.max_abs is None:
            return "NaN or infinity"
        return f"max abs {self.max_abs:.1e}, max relative {self.max_rel:.1e}, relative L2 {self.rel_l2:.1e}"


def measure_error(got: NDArray[Any], want: NDArray[Any]) -> Error:
    """``got`` against ``want`` of the same shape, in float64. Equal infinities at one place are no difference."""
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    if not (same | (np.isfinite(got) & np.isfinite(want))).all():
        return Error(max_abs=None, max_rel=None, rel_l2=None)
    with np.errstate(invalid="ignore"):  # infinity minus itself, which is not looked at
        difference = np.where(same, 0.0, got.astype(np.float64) - want.astype(np.float64))
    reference = np.where(np.isfinite(want), want, 0.0).astype(np.float64)
    largest, peak = float(abs(difference).max(initial=0.0)), float(abs(reference).max(initial=0.0))
    norm, total = math.sqrt(float((difference**2).sum())), math.sqrt(float((reference**2).sum()))
    # A reference of zeros allows zeros only, so there the absolute figures are taken.
    return Error(max_abs=largest, max_rel=largest / (peak or 1.0), rel_l2=norm / (total or 1.0))
