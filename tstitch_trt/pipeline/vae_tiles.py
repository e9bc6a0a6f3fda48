"""The pipeline's VAE on engines: whole, or in the tiles of ``vae.enable_tiling()``, blended as diffusers does.

Tiles of ``AutoencoderKL`` begin every ``1 - overlap`` of their side, the last ones are what is left; each fades in over
its overlap with the one above and the one to its left, and only what lies before the next one's beginning is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import BadInput
from tstitch_trt.pipeline.code_origin import library_base
from tstitch_trt.pipeline.wrapped import unwrap_compiled
from tstitch_trt.runtime.runtime import Runtime

__all__ = ["decode_images", "encode_pictures"]

Array = NDArray[np.float32]


@dataclass(frozen=True)
class _Tiling:
    """``side`` and ``step`` of tiles of what goes in; of what comes out ``overlap`` fades and ``keep`` is kept."""

    side: int
    step: int
    overlap: int
    keep: int

    @staticmethod
    def of(vae: Any, side: int, out: int) -> _Tiling:
        """``side`` of tiles that go in, ``out`` of those that come out."""
        overlap = int(out * vae.tile_overlap_factor)
        return _Tiling(side, int(side * (1 - vae.tile_overlap_factor)), overlap, out - overlap)


def decode_images(runtime: Runtime, vae: Any, latents: Array) -> Array:
    """Latents float32 ``[N,C,h,w]`` in the pipeline's scaling as images ``[N,3,H,W]`` in about [-1, 1]."""
    if not _tiled(vae, latents, vae.tile_latent_min_size):
        return runtime.images(latents)
    tiling = _Tiling.of(vae, vae.tile_latent_min_size, vae.tile_sample_min_size)
    return _blended(tiling, latents, lambda tile: runtime.images(tile, tile="off"))


def encode_pictures(runtime: Runtime, vae: Any, pictures: Array) -> tuple[Array, Array]:
    """Pictures float32 ``[N,3,H,W]`` in [-1, 1] as mean and standard deviation of their latents ``[N,C,h,w]``."""
    if not _tiled(vae, pictures, vae.tile_sample_min_size):
        return runtime.encode(pictures)

    def moments(tile: Array) -> Array:
        mean, std = runtime.encode(tile, tile="off")
        return np.concatenate([mean, np.log(std)], axis=1)  # diffusers blends the logarithm too

    tiling = _Tiling.of(vae, vae.tile_sample_min_size, vae.tile_latent_min_size)
    mean, log = np.split(_blended(tiling, pictures, moments), 2, axis=1)
    return mean, np.exp(log)


def _tiled(vae: Any, array: Array, side: int) -> bool:
    """Raises ``BadInput`` where a VAE is to be tiled that is blended in another way."""
    if not getattr(vae, "use_tiling", False):
        return False
    name = library_base(type(unwrap_compiled(vae))).__name__
    if name == "AutoencoderKL":
        return bool(max(array.shape[2:]) > side)
    if max(array.shape[2:]) > side - int(side * vae.tile_overlap_factor):
        raise BadInput(
            f"the pipeline's vae is an {name} with tiling on; its engines run in the tiles of AutoencoderKL alone",
            hint="switch it off: pipe.vae.disable_tiling()",
        )
    return False


def _blended(tiling: _Tiling, array: Array, run: Callable[[Array], Array]) -> Array:
    side, step, keep = tiling.side, tiling.step, tiling.keep
    try:
        rows = [
            [np.array(run(array[:, :, y : y + side, x : x + side])) for x in range(0, array.shape[3], step)]
            for y in range(0, array.shape[2], step)
        ]
    except BadInput as error:
        raise type(error)(
            f"a tile of the pipeline's vae: {error.message}",
            hint=f"{error.hint}, so that the tiles at the edges fit too; or switch tiling off: "
            "pipe.vae.disable_tiling()",
        ) from None
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            if i:
                _fade(rows[i - 1][j], tile, tiling.overlap, axis=2)
            if j:
                _fade(row[j - 1], tile, tiling.overlap, axis=3)
    kept = [np.concatenate([tile[:, :, :keep, :keep] for tile in row], axis=3) for row in rows]
    return np.concatenate(kept, axis=2)


def _fade(before: Array, tile: Array, overlap: int, axis: int) -> None:
    """``tile`` begins as the end of ``before`` and fades into itself, in a straight line, in place."""
    length = min(before.shape[axis], tile.shape[axis], overlap)
    own = np.moveaxis(tile, axis, -1)[..., :length]
    end = np.moveaxis(before, axis, -1)[..., before.shape[axis] - length :]
    share = np.arange(length, dtype=np.float32) / np.float32(max(length, 1))
    own[...] = end * (1 - share) + own * share
