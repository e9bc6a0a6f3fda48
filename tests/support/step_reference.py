"""One step in float64 numpy, straight from the equations of ``step_row``; the oracle of the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.device.step_row import (
    FLAG_GIVEN_NOISE,
    FLAG_INPAINT,
    FLAG_LEARNED,
    FLAG_STORE,
    FLAG_STORE_Y,
    INITIAL_NOISE_STEP,
    ROW,
)

F64 = NDArray[np.float64]

_MASK = 0xFFFFFFFF


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> list[Any]:
    """Philox 4x32-10 on arrays of 64-bit words that hold 32-bit values."""
    c = [np.asarray(word, np.uint64) for word in counter]
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high0, high1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c = [high1 ^ c[1] ^ np.uint64(k0), p1 & np.uint64(_MASK), high0 ^ c[3] ^ np.uint64(k1), p0 & np.uint64(_MASK)]
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c


def normals(seed: int, step: int, n: int) -> F64:
    """Box-Muller on the words of ``philox`` with counter (block, block >> 32, step, 0), four normals a block."""
    block = np.arange(-(-n // 4), dtype=np.uint64)
    low, high = block & np.uint64(_MASK), block >> np.uint64(32)
    words = philox((low, high, np.uint64(step & _MASK), np.uint64(0)), (seed & _MASK, seed >> 32 & _MASK))
    z = np.empty((len(block), 4))
    for pair in (0, 2):
        radius = np.sqrt(-2 * np.log(words[pair] * 2.0**-32 + 2.0**-33))
        angle = 2 * np.pi * (words[pair + 1] * 2.0**-32)
        z[:, pair], z[:, pair + 1] = radius * np.cos(angle), radius * np.sin(angle)
    return z.ravel()[:n]


def guided_output(row: F64, cond: F64, uncond: F64 | None, *, rescale: bool) -> F64:
    """m of one lane ``[C, ...]``."""
    if uncond is None:
        return cond
    k = int(min(row[ROW["GUIDED_CHANNELS"]], len(cond)))
    c, m = cond[:k], uncond[:k] + row[ROW["G"]] * (cond[:k] - uncond[:k])
    strength = row[ROW["RESCALE"]]
    if rescale and strength and k:
        m = strength * (c.std() / m.std()) * m + (1 - strength) * m
    return np.concatenate([m, cond[k:]])


class Lane:
    """The state of one lane: its latent, the history ring as a plain list of every stored D, y, step and seed.

    ``image``, ``noise`` ``[C, ...]`` and ``mask`` ``[1, ...]`` are the lane's part of the inpaint.
    """

    def __init__(
        self,
        x: NDArray[Any],
        rows: NDArray[Any],
        seed: int,
        image: NDArray[Any] | None = None,
        mask: NDArray[Any] | None = None,
        noise: NDArray[Any] | None = None,
    ) -> None:
        self.image, self.mask, self.noise = image, mask, noise
        self.y: F64 | None = None
        self.x = x.astype(np.float64)
        self.rows = rows.astype(np.float64)
        self.seed = seed
        self.step = 0
        self.stored: dict[int, F64] = {}

    def advance(self, output: NDArray[Any], uncond: NDArray[Any] | None, *, rescale: bool) -> None:
        """``output`` and ``uncond``: ``[C or 2C, ...]``."""
        row = self.rows[self.step]
        channels = len(self.x)
        cond = output.astype(np.float64)
        m = guided_output(
            row, cond[:channels], None if uncond is None else uncond.astype(np.float64)[:channels], rescale=rescale
        )
        flags = int(row[ROW["FLAGS"]])
        d = row[ROW["P"]] * self.x + row[ROW["Q"]] * m
        x = row[ROW["A"]] * self.x + row[ROW["B"]] * d
        y = row[ROW["YX"]] * self.x + row[ROW["YB"]] * d
        for back, letter in enumerate("CEF", 1):
            if row[ROW[letter]]:
                x = x + row[ROW[letter]] * self.stored[self.step - back]
            if row[ROW["Y" + letter]] and flags & FLAG_STORE_Y:
                y = y + row[ROW["Y" + letter]] * self.stored[self.step - back]
        if row[ROW["Y"]]:
            assert self.y is not None
            x = x + row[ROW["Y"]] * self.y
        if row[ROW["YY"]] and flags & FLAG_STORE_Y:
            assert self.y is not None
            y = y + row[ROW["YY"]] * self.y
        if row[ROW["S"]]:
            scale: Any = row[ROW["S"]]
            if flags & FLAG_LEARNED:
                lo, hi = row[ROW["LOG_STD_MIN"]], row[ROW["LOG_STD_MAX"]]
                scale = scale * np.exp(lo + (hi - lo) * (cond[channels:] + 1) / 2)
            x = x + scale * normals(self.seed, self.step, self.x.size).reshape(self.x.shape)
        if flags & FLAG_INPAINT:
            assert self.image is not None
            assert self.mask is not None
            z0: Any = self.noise
            if not flags & FLAG_GIVEN_NOISE:
                z0 = normals(self.seed, INITIAL_NOISE_STEP, self.x.size).reshape(self.x.shape)
            image = row[ROW["IMAGE_A"]] * self.image.astype(np.float64) + row[ROW["IMAGE_S"]] * z0
            x = self.mask * x + (1 - self.mask) * image
        if flags & FLAG_STORE:
            self.stored[self.step] = d
        if flags & FLAG_STORE_Y:
            self.y = y
        self.x = x
        self.step += 1
