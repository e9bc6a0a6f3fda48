"""The step kernels alone, from one lane to thousands: microseconds, and bytes per second against the copy ceiling.

The pairs of a run touch the same memory. As long as that fits in the L2 cache they are served from there, and their
bytes per second say nothing of the device's memory: those are given without a share of the ceiling.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpubench.ceilings import copy_rate
from gpubench.record import Context, Entry, Part, spread_of
from tstitch_engines.device.base import Device
from tstitch_engines.device.open import open_device
from tstitch_engines.device.step_row import ROW, ROW_FIELDS
from tstitch_engines.spec import itemsize
from tstitch_trt.runtime.arena import LaneArena
from tstitch_trt.runtime.lane_program import LaneProgram, StepKey

__all__ = ["kernel_part", "pair_bytes"]

SHAPE = (4, 32, 32)  # the latent of 256 px
_PAIRS = 64
_L2_TIMES = 2  # of the cache: from so many bytes on, what one pair leaves there is of no use to the next


def pair_bytes(lanes: int, dtype: str, shape: tuple[int, int, int] = SHAPE) -> int:
    """Least bytes of one guided ``prepare`` and ``advance`` of DDIM.

    prepare reads the latent (float32) and writes both halves; advance reads both halves' noise (not the learned
    variance behind it) and the latent, and writes the latent.
    """
    elements = int(np.prod(shape))
    return lanes * elements * (4 + 2 * itemsize(dtype) + 2 * itemsize(dtype) + 4 + 4)


def kernel_part(context: Context, part: Part) -> None:
    device = open_device(context.device)
    lanes = (1, 8) if context.smoke else (1, 8, 32, 256, 2048, 8192)
    size = 1 << 20 if context.smoke else 1 << 30
    part.attempt("copy", lambda entry: copy_rate(context.device, nbytes=size))
    for dtype in ("float32",) if context.smoke else ("float16", "bfloat16"):
        for count in lanes:

            def pairs(entry: Entry, dtype: str = dtype, count: int = count) -> Entry:
                return _measure(device, dtype, count, context.rounds)

            part.attempt(f"{dtype} {count} lanes", pairs, reserve=10)


def _measure(device: Device, dtype: str, lanes: int, rounds: int) -> Entry:
    """Pairs recorded into one graph where there are graphs, so that launches do not hide the kernels."""
    arena = LaneArena(device, slots=lanes, latent_shape=SHAPE, table_rows=_PAIRS, conditioning={})
    kernels = arena.kernels(SHAPE)
    channels, height, width = SHAPE
    key = StepKey("", lanes, True, False, (height, width))
    active = device.empty((lanes,), "int32")
    sample = device.empty((2 * lanes, *SHAPE), dtype)
    timestep = device.empty((2 * lanes,), "float32")
    output = device.empty((2 * lanes, 2 * channels, height, width), dtype)
    device.upload(active, np.arange(lanes, dtype=np.int32))
    noise = np.random.default_rng(0).standard_normal(output.shape, np.float32)
    device.upload(output, _stored(noise, dtype))
    rows = np.zeros((_PAIRS, len(ROW_FIELDS)), np.float32)
    for name, value in {
        "T": 500,
        "C_IN": 1,
        "P": 1.0,
        "Q": -0.1,
        "A": 0.5,
        "B": 0.5,
        "G": 4,
        "GUIDED_CHANNELS": 3,
    }.items():
        rows[:, ROW[name]] = value

    def pairs() -> None:
        for _ in range(_PAIRS):
            kernels.prepare(active, sample, timestep, guided=True)
            kernels.advance(active, output, guided=True, rescale=False)

    def start() -> None:
        arena.write(0, [LaneProgram(rows, seed, 0, (key,) * len(rows)) for seed in range(lanes)])
        device.synchronize()

    start()
    pairs()
    device.synchronize()
    launch = device.capture(pairs).launch if device.graphs else pairs
    times = []
    for _ in range(rounds + 1):
        start()
        watch = device.stopwatch()
        watch.mark()
        launch()
        watch.mark()
        times.append(watch.milliseconds()[0] / _PAIRS)
    times = times[1:]
    nbytes = pair_bytes(lanes, dtype)
    return {
        "pair_us": spread_of([1e3 * ms for ms in times]),
        "bytes": nbytes,
        "in_l2": _in_l2(device, nbytes),
        "gb_per_s": spread_of([nbytes / ms / 1e6 for ms in times]),
        "recorded": device.graphs,
    }


def _in_l2(device: Device, nbytes: int) -> bool | None:
    """Whether a cache as large as this device's may hold a part of ``nbytes``; ``None`` where there is no such."""
    if device.name == "cpu":
        return None
    import torch

    return nbytes < _L2_TIMES * torch.cuda.get_device_properties(device.name).L2_cache_size


def _stored(values: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """``values`` float32 as ``dtype`` is kept in numpy: bfloat16 as its bits, cut off."""
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)
