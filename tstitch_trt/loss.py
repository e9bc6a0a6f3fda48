"""How far a quantised graph's outputs are from the source's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import QuantisationLoss

__all__ = ["loss_of", "relative"]


def loss_of(timesteps: NDArray[np.float32], got: NDArray[np.float32], want: NDArray[np.float32]) -> QuantisationLoss:
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (got, want))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = np.where(lengths > 0, (a * b).sum(1) / np.where(lengths > 0, lengths, 1), 1.0)
    return QuantisationLoss(
        timesteps=(float(timesteps.max()), float(timesteps.min())),
        rows=len(a),
        rel_l2=relative(got, want),
        cosine=float(cosines.min()),
        max_abs=float(abs(a - b).max()),
    )


def relative(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """Norm of the difference over norm of ``want``, in float64."""
    reference = want.astype(np.float64)
    return float(np.linalg.norm(got.astype(np.float64) - reference) / (np.linalg.norm(reference) or 1.0))
