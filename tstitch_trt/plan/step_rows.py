"""Fills the rows that the step kernels read (``step_row``) from a step table and the members' numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tstitch_engines.device.step_row import (
    FLAG_GIVEN_NOISE,
    FLAG_INPAINT,
    FLAG_LEARNED,
    FLAG_STORE,
    FLAG_STORE_Y,
    ROW,
    ROW_FIELDS,
)
from tstitch_engines.errors import BadInput
from tstitch_trt.solvers.table import Y_COLUMNS, StepTable

__all__ = ["fill_rows", "reads_before", "with_inpainting"]

Array = NDArray[np.float64]

_FROM_TABLE = {
    "T": "t",
    "C_IN": "c_in",
    **{name: name for name in ("A", "B", "C", "E", "F", "S", "Y", *Y_COLUMNS)},
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
    """float64 ``[N, 25]``. Every argument is one value or one for each step, ``[N]``.

    ``p``, ``q``: the member's prediction type (``prediction.coefficients(kind, table.a, table.s,
    estimate=table.estimate)``).
    ``guided_channels``: how many leading channels are guided. ``learned``: the member of that step gives a second half
    of channels for the variance. ``FLAG_STORE`` and ``FLAG_STORE_Y`` are set exactly where a later row reads the
    step's estimate or ``y'``, and ``FLAG_LEARNED`` where the noise is scaled by the model's variance. ``IMAGE_A`` and
    ``IMAGE_S`` are always there, for ``with_inpainting``. Raises ``BadInput``.
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
    # A picture is put back at the noise of the next row, and after the last one clean, as diffusers does.
    rows[:, ROW["IMAGE_A"]], rows[:, ROW["IMAGE_S"]] = np.append(table.a[1:], 1.0), np.append(table.s[1:], 0.0)
    kept = _kept_y(table)
    rows[:, [ROW[name] for name in Y_COLUMNS]] *= kept[:, None]
    stored = np.zeros(table.steps, bool)
    for back, names in enumerate((("C", "YC"), ("E", "YE"), ("F", "YF")), 1):
        for name in names:
            stored[:-back] |= rows[back:, ROW[name]] != 0
    rows[:, ROW["FLAGS"]] = FLAG_LEARNED * scaled + FLAG_STORE * stored + FLAG_STORE_Y * kept
    return rows


def with_inpainting(rows: NDArray[np.floating], *, given_noise: bool = False) -> Array:
    """A copy of ``rows`` ``[N, 25]`` that keeps a picture outside the lanes' masks after every step (inpainting).

    ``given_noise``: the lanes started from noise in the arena's ``noise`` buffer instead of noise drawn from their
    seeds, and the picture is brought to each noise level with the same.
    """
    found = np.array(rows, np.float64)
    flags = found[:, ROW["FLAGS"]].astype(np.int64) | FLAG_INPAINT | (FLAG_GIVEN_NOISE if given_noise else 0)
    found[:, ROW["FLAGS"]] = flags
    return found


def reads_before(rows: NDArray[np.floating], start: int) -> bool:
    """Whether row ``start`` or a later one reads an estimate or a ``y`` of a row before it."""
    for back, names in enumerate((("C", "YC"), ("E", "YE"), ("F", "YF")), 1):
        if rows[start : start + back, [ROW[name] for name in names]].any():
            return True
    for row in rows[start:]:
        if row[ROW["Y"]] or row[ROW["YY"]]:
            return True
        if int(row[ROW["FLAGS"]]) & FLAG_STORE_Y:
            return False
    return False


def _kept_y(table: StepTable) -> NDArray[np.bool_]:
    """Rows that write a ``y`` which is read before it is written again."""
    kept, wanted = table.writes_y.copy(), False
    for row in range(table.steps - 1, -1, -1):
        if kept[row]:
            kept[row], wanted = wanted, False
        wanted = wanted or table.Y[row] != 0 or (kept[row] and table.YY[row] != 0)
    return kept


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
    wrong = (channels < 0) | (channels != np.round(channels))
    if wrong.any():
        raise BadInput(
            f"guided channels {channels[wrong][0]:g}; allowed are whole numbers of 0 or more",
            hint="pass the number of leading latent channels to guide",
        )
