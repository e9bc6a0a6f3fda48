"""Prediction types: the coefficients that turn a member's output into an estimate of the clean latent."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tstitch_engines.errors import BadInput, unknown_name

__all__ = ["PREDICTION_TYPES", "coefficients", "of_estimate"]

Array = NDArray[np.float64]


def _v(a: Array, s: Array) -> tuple[Array, Array]:
    # v = alpha eps - sigma x0 (arXiv 2202.00512, appendix D) in the variance-preserving space, where the latent is x/r.
    r = np.hypot(a, s)
    return a / r**2, -s / r


# Flow matching (v = eps - x0 on x = (1 - t) x0 + t eps, so p = 1, q = -s) is one more entry here.
_KINDS: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "eps": lambda a, s: (1 / a, -s / a),
    "v": _v,
    "x0": lambda a, s: (np.zeros_like(a), np.ones_like(a)),
}
PREDICTION_TYPES = tuple(_KINDS)


def of_estimate(estimate: str, p: Array, q: Array, a: Array, s: Array) -> tuple[Array, Array]:
    """``(p, q)`` of ``estimate`` from those of the clean latent ``x0 = p x + q m``, at ``x = a x0 + s eps``, ``s > 0``.

    ``estimate``: ``x0``; ``eps = (x - a x0) / s``; ``v = (a eps - s x0) / r``. Raises ``UnknownName``.
    """
    if estimate == "x0":
        return p, q
    if estimate == "eps":
        return (1 - a * p) / s, -a * q / s
    if estimate == "v":  # a/r eps - s/r x0, with a^2 + s^2 = r^2
        r = np.hypot(a, s)
        return (a - r**2 * p) / (r * s), -r * q / s
    raise unknown_name("estimate", estimate, PREDICTION_TYPES)


def coefficients(kind: str, a: ArrayLike, s: ArrayLike, *, estimate: str = "x0") -> tuple[Array, Array]:
    """``(p, q)`` with ``D = p x + q m`` for a latent ``x = a x0 + s eps`` and a member's output ``m``.

    ``kind``: the member's prediction type. ``D`` estimates the clean latent, or what ``estimate`` says
    (``of_estimate``). ``a`` and ``s`` (same shape, any) are the solver's, so one member serves variance-preserving
    (``a^2 + s^2 = 1``) and variance-exploding (``a = 1``) solvers. Raises ``UnknownName``, and ``BadInput`` for
    ``a < 0`` or ``s < 0``, and for ``eps`` where ``a = 0``: noise alone says nothing of the clean latent.
    """
    make = _KINDS.get(kind)
    if make is None:
        raise unknown_name("prediction type", kind, PREDICTION_TYPES)
    a, s = np.asarray(a, np.float64), np.asarray(s, np.float64)
    if a.shape != s.shape or not (np.isfinite(a).all() and np.isfinite(s).all() and (a >= 0).all() and (s >= 0).all()):
        raise BadInput(
            f"latent scales a {a} and s {s}; allowed are finite arrays of one shape with a >= 0 and s >= 0",
            hint="pass the columns a and s of a step table",
        )
    if kind == "eps" and (a == 0).any():
        raise BadInput(
            "a prediction of the noise (eps) says nothing of the clean latent where there is no signal (a = 0)",
            hint="use a model that predicts v or x0 there, or begin at less noise",
        )
    if kind == estimate:
        return np.zeros_like(a), np.ones_like(a)
    return of_estimate(estimate, *make(a, s), a, s)
