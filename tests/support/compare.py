"""How far arrays are from what they should be."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["relative_error"]


def relative_error(got: Any, want: Any) -> float:
    """The largest difference over the largest value of ``want``, in float64; arrays or tensors of one shape.

    Not the L2 norm: a fault in a few elements would drown in it.
    """
    ours, right = _float64(got), _float64(want)
    assert ours.shape == right.shape
    return float(np.abs(ours - right).max() / np.abs(right).max())


def _float64(values: Any) -> NDArray[np.float64]:
    return np.asarray(values.detach().numpy() if hasattr(values, "detach") else values, np.float64)
