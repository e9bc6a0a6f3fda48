"""A float64 walker over the rows of ``step_row``: the plain meaning of a trajectory, in numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.device.step_row import FLAG_INPAINT, FLAG_LEARNED, FLAG_STORE, FLAG_STORE_Y, ROW

__all__ = ["Model", "guide", "walk"]

Array = NDArray[np.float64]
# (sample [B,C,...], timestep, step) -> conditional output [B,C or 2C,...], or (conditional, unconditional)
Model = Callable[[Array, float, int], "Array | tuple[Array, Array]"]


def walk(
    rows: Array, x: Array, model: Model, noise: Array, *, inpainting: tuple[Array, Array, Array] | None = None
) -> Array:
    """The latents ``[N+1, B, C, ...]`` of a trajectory: before the first step, then after each one.

    ``rows`` float ``[N, 25]``; ``x`` ``[B, C, ...]`` is the starting latent, already scaled; ``noise``
    ``[N, B, C, ...]``. What was not stored is NaN for later rows, so a missing flag shows. ``inpainting``:
    image latents, mask ``[B, 1, ...]`` and initial noise, for rows with ``FLAG_INPAINT``.
    """
    latents = [np.asarray(x, np.float64)]
    estimates: list[Array] = []
    second = np.full_like(latents[0], np.nan)
    for step, row in enumerate(np.asarray(rows, np.float64)):
        x = latents[-1]
        output = model(row[ROW["C_IN"]] * x, float(row[ROW["T"]]), step)
        cond, uncond = output if isinstance(output, tuple) else (output, None)
        channels = x.shape[1]
        m = cond[:, :channels] if uncond is None else guide(row, cond[:, :channels], uncond[:, :channels])
        estimate = row[ROW["P"]] * x + row[ROW["Q"]] * m
        after = row[ROW["A"]] * x + row[ROW["B"]] * estimate
        y = row[ROW["YX"]] * x + row[ROW["YB"]] * estimate
        for back, name in enumerate("CEF", 1):
            if row[ROW[name]] != 0:
                after = after + row[ROW[name]] * estimates[step - back]
            if row[ROW["Y" + name]] != 0:
                y = y + row[ROW["Y" + name]] * estimates[step - back]
        if row[ROW["Y"]] != 0:
            after = after + row[ROW["Y"]] * second
        if row[ROW["YY"]] != 0:
            y = y + row[ROW["YY"]] * second
        if int(row[ROW["FLAGS"]]) & FLAG_STORE_Y:
            second = y
        if row[ROW["S"]] != 0:
            scale = row[ROW["S"]]
            if int(row[ROW["FLAGS"]]) & FLAG_LEARNED:
                low, high = row[ROW["LOG_STD_MIN"]], row[ROW["LOG_STD_MAX"]]
                scale = scale * np.exp(low + (high - low) * (cond[:, channels:] + 1) / 2)
            after = after + scale * noise[step]
        if int(row[ROW["FLAGS"]]) & FLAG_INPAINT:
            assert inpainting is not None
            image, mask, unit = inpainting
            after = mask * after + (1 - mask) * (row[ROW["IMAGE_A"]] * image + row[ROW["IMAGE_S"]] * unit)
        estimates.append(estimate if int(row[ROW["FLAGS"]]) & FLAG_STORE else np.full_like(estimate, np.nan))
        latents.append(after)
    return np.stack(latents)


def guide(row: Array, cond: Array, uncond: Array) -> Array:
    """Classifier-free guidance of one row on ``[B, C, ...]``, each lane rescaled on its own."""
    k = int(row[ROW["GUIDED_CHANNELS"]])
    guided = uncond[:, :k] + row[ROW["G"]] * (cond[:, :k] - uncond[:, :k])
    if row[ROW["RESCALE"]] != 0:
        axes = tuple(range(1, cond.ndim))
        ratio = cond[:, :k].std(axis=axes, keepdims=True) / guided.std(axis=axes, keepdims=True)
        guided = row[ROW["RESCALE"]] * ratio * guided + (1 - row[ROW["RESCALE"]]) * guided
    return np.concatenate([guided, cond[:, k:]], axis=1)
