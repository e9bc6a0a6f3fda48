"""The same few steps on any device, to compare one driver of the step kernels with another."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.device.base import ArenaBuffers, Device
from tstitch_engines.device.step_row import (
    FLAG_GIVEN_NOISE,
    FLAG_INPAINT,
    FLAG_LEARNED,
    FLAG_STORE,
    FLAG_STORE_Y,
    HISTORY,
    ROW,
    ROW_FIELDS,
)


def run(
    device: Device,
    dtype: str,
    timestep: str,
    shape: tuple[int, ...],
    *,
    guided: bool,
    largest: tuple[int, ...] | None = None,
) -> list[NDArray[Any]]:
    """Five steps of rows that use every term, on lanes at different steps; all arrays that the kernels wrote.

    ``largest``: the latent that the arena has memory for, by default ``shape``.
    """
    rng = np.random.default_rng(0)
    lanes, steps = 4, 6
    table = rng.uniform(0.2, 0.8, (lanes, steps, len(ROW_FIELDS))).astype(np.float32)
    for name, value in {
        "G": 1.5, "GUIDED_CHANNELS": shape[0] - 1, "RESCALE": 0.5, "LOG_STD_MIN": -1, "LOG_STD_MAX": 0,
        "FLAGS": FLAG_STORE + FLAG_LEARNED + FLAG_STORE_Y + FLAG_INPAINT,
    }.items():  # fmt: skip
        table[..., ROW[name]] = value
    for back, names in enumerate(("CY", "E", "F"), 1):
        table[:, :back, [ROW[name] for letter in names for name in (letter, f"Y{letter}")]] = 0
    table[1::2, :, ROW["FLAGS"]] += FLAG_GIVEN_NOISE
    room = shape if largest is None else largest
    values: dict[str, tuple[NDArray[Any], str]] = {
        "latents": (rng.standard_normal((lanes, *room)).astype(np.float32), "float32"),
        "history": (np.zeros((HISTORY, lanes, *room), np.float32), "float32"),
        "y": (np.zeros((lanes, *room), np.float32), "float32"),
        "image": (rng.standard_normal((lanes, *room)).astype(np.float32), "float32"),
        "mask": (rng.uniform(0, 1, (lanes, 1, *room[1:])).astype(np.float32), "float32"),
        "noise": (rng.standard_normal((lanes, *room)).astype(np.float32), "float32"),
        "rows": (table, "float32"),
        "step": (np.zeros(lanes, np.int32), "int32"),
        "seed": (np.array([1, -2, 3, 2**62], np.int64), "int64"),
        "fault": (np.full(lanes, -1, np.int32), "int32"),
    }
    arena: dict[str, Any] = {}
    for name, (array, kind) in values.items():
        arena[name] = device.empty(array.shape, kind)
        device.upload(arena[name], array)
    kernels = device.step_kernels(ArenaBuffers(**arena), shape)
    stride = 4 * int(np.prod(room))
    device.initial_noise(device.view(arena["latents"], stride, (1, *shape), "float32"), 0, 5, 2.0)
    for order in ([0, 1, 2, 3], [3, 1], [2, 3, -1, 0], [1, -1, -1], [3, 0, 1, -1]):
        total = len(order) * (1 + guided)
        active = device.empty((len(order),), "int32")
        device.upload(active, np.array(order, np.int32))
        sample, times = device.empty((total, *shape), dtype), device.empty((total,), timestep)
        kernels.prepare(active, sample, times, guided=guided)
        output = device.empty((total, 2 * shape[0], *shape[1:]), dtype)
        noise = rng.standard_normal(output.shape).astype(np.float32)
        bits = (noise.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else noise.astype(dtype)
        device.upload(output, bits)
        kernels.advance(active, output, guided=guided, rescale=guided)
    results = [device.download(arena[name]) for name in ("latents", "history", "y", "step", "fault")]
    return [*results, device.download(sample).astype(np.float32), device.download(times)]
