"""Statistics of repeated measurements."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass

__all__ = ["spread"]


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    low, middle, high = np.percentile(list(values), [10, 50, 90])
    return float(middle), float(low), float(high)
