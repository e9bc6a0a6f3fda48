"""Fills the rows that the step kernels read (``tstitch_engines.rows``) from a step table and the members' numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tstitch_engines.errors import BadInput
from tstitch_engines.rows import FLAG_LEARNED, FLAG_STORE, ROW, ROW_FIELDS
from tstitch_trt.solvers.table import StepTable

__all__ = ["fill_rows"]

Array = NDArray[np.float64]

_FROM_TABLE = {
    "T": "t",
    "C_IN": "c_in",
    "A": "A",
    "B": "B",
    "C": "C",
    "E": "E",
    "S": "S",
    "LOG_STD_MIN": "log_std_min",
    "LOG_STD_MAX": "log_std_max",
}


def fill_rows(
    table: StepTable,
    *,
    p: ArrayLike,
    q: ArrayLike,
    guidance: ArrayLike = 1.0,
    rescale: ArrayLike = 0.0,
    guided_channels: ArrayLike = 0,
    learned: ArrayLike = False,
) -> Array:
    """float64 ``[N, 16]``. Every argument is one value or one for each step, ``[N]``.

    ``p``, ``q``: the member's parametrisation (``parametrisation.coefficients(kind, table.a, table.s)``).
    ``guided_channels``: how many leading channels are guided. ``learned``: the member of that step gives a second half
    of channels for the variance. ``FLAG_STORE`` is set exactly where a later row reads the step's estimate, and
    ``FLAG_LEARNED`` where the noise is scaled by the model's variance. Raises ``BadInput``.
    """
    rows = np.zeros((table.steps, len(ROW_FIELDS)))
    for field, column in _FROM_TABLE.items():
        rows[:, ROW[field]] = getattr(table, column)
    given = {
        "P": p,
        "Q": q,
        "G": guidance,
        "RESCALE": rescale,
        "GUIDED_CHANNELS": guided_channels,
    }
    for field, values in given.items():
        rows[:, ROW[field]] = _per_step(table, field, values)
    _check_guidance(rows)

    has_variance = _per_step(table, "learned", learned) != 0
    scaled = (table.S > 0) & table.uses_variance
    lacking = np.flatnonzero(scaled & ~has_variance)
    if lacking.size:
        raise BadInput(
            f"solver {table.solver} reads a learned variance, but the member of step {lacking[0]} has none",
            hint="use variance='fixed-small' or 'fixed-large', or members that were trained with a learned variance",
        )
    stored = np.zeros(table.steps, bool)
    stored[:-1] |= table.C[1:] != 0
    stored[:-2] |= table.E[2:] != 0
    rows[:, ROW["FLAGS"]] = FLAG_LEARNED * scaled + FLAG_STORE * stored
    return rows


def _per_step(table: StepTable, name: str, values: ArrayLike) -> Array:
    array = np.asarray(values, np.float64)
    if array.shape not in ((), (table.steps,)) or not np.isfinite(array).all():
        raise BadInput(
            f"{name} has shape {list(array.shape)} or is not finite; allowed is one finite value, "
            f"or one for each of the {table.steps} steps",
            hint=f"pass a number or an array of {table.steps} numbers for {name}",
        )
    return np.broadcast_to(array, (table.steps,))


def _check_guidance(rows: Array) -> None:
    rescale, channels = rows[:, ROW["RESCALE"]], rows[:, ROW["GUIDED_CHANNELS"]]
    if ((rescale < 0) | (rescale > 1)).any():
        raise BadInput(
            f"guidance rescale runs from {rescale.min():g} to {rescale.max():g}; allowed is 0 to 1",
            hint="use 0 (off) to 1, usually 0.7",
        )
    if ((channels < 0) | (channels != np.round(channels))).any():
        raise BadInput(
            f"guided channels {channels[(channels < 0) | (channels != np.round(channels))][0]:g}; "
            "allowed are whole numbers of 0 or more",
            hint="pass the number of leading latent channels to guide",
        )
