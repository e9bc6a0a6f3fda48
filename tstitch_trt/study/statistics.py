"""Statistics of repeated measurements, and the distance of arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["compare_rows", "relative_error", "spread"]

Doubles = NDArray[np.float64]


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    low, middle, high = np.percentile(list(values), [10, 50, 90])
    return float(middle), float(low), float(high)


def relative_error(got: NDArray[Any], want: NDArray[Any]) -> float:
    """``|got - want| / |want|`` over whole arrays in float64; ``|got|`` where ``want`` is all zeros."""
    reference = want.astype(np.float64)
    return float(np.linalg.norm(got.astype(np.float64) - reference) / (np.linalg.norm(reference) or 1.0))


def compare_rows(got: NDArray[Any], want: NDArray[Any]) -> tuple[Doubles, Doubles]:
    """Cosine and relative L2 error of each row, ``[N,...]`` -> float64 ``[N]`` twice.

    Exactly 1 and 0 for equal rows. Where exactly one of the two is all zeros the cosine is 0. Where ``want`` is, the
    error is the norm of ``got``.
    """
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (got, want))
    aa, bb, ab = ((x * y).sum(1) for x, y in ((a, a), (b, b), (a, b)))
    lengths = np.sqrt(aa * bb)
    cosine = np.where(lengths > 0, ab / np.where(lengths > 0, lengths, 1.0), (aa == bb).astype(np.float64))
    return cosine, np.sqrt(((a - b) ** 2).sum(1)) / np.where(bb > 0, np.sqrt(bb), 1.0)
