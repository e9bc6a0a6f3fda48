"""Where a trajectory starts other than from noise: a picture, encoded and noised to a step, and what of it stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.device.step_row import INITIAL_NOISE_STEP
from tstitch_engines.errors import NotFinite, Unavailable
from tstitch_trt.request.parse import InitOptions

__all__ = [
    "ENCODER_NOISE_STEP",
    "Encode",
    "InitImage",
    "make_init_image",
    "noise_of",
]

Array = NDArray[np.float32]

ENCODER_NOISE_STEP = INITIAL_NOISE_STEP - 1  # the Philox "step" of the encoder's own noise

Encode = Callable[[Array], tuple[Array, Array]]
"""A picture encoder: pictures float32 ``[N,3,H,W]`` in [-1, 1] to mean and standard deviation of their latents
``[N,C,h,w]``."""


@dataclass(frozen=True)
class InitImage:
    """A picture to start from, all float32 with one row per image.

    ``clean`` ``[N,C,h,w]``: its latent; ``noise`` likewise: the unit noise that is mixed into it. ``mask``
    ``[N,1,h,w]``: 1 where it is painted anew, ``None``: everywhere. ``outside`` ``[N,C,h,w]``: the latent of the
    picture with what is to be painted greyed out, for members that are told.
    """

    clean: Array
    noise: Array
    mask: Array | None
    outside: Array | None

    def state(self, a: float, s: float) -> Array:
        """``a x0 + s z``, the latent at a step where that is the noise level."""
        return np.asarray(np.float32(a) * self.clean + np.float32(s) * self.noise)


def noise_of(seeds: tuple[int, ...], shape: tuple[int, ...], step: int = INITIAL_NOISE_STEP) -> Array:
    """The unit Gaussian noise of each seed, float32 ``[N, *shape]``, as the lanes draw it."""
    from tstitch_engines.device.host_kernels import normal

    size = int(np.prod(shape))
    return np.stack([normal(seed, step, size).reshape(shape) for seed in seeds])


def _latents_of(
    manifest: Manifest,
    encode: Encode | None,
    pictures: NDArray[Any],
    seeds: tuple[int, ...],
    *,
    outside: Array | None = None,
) -> Array:
    """The latents of pictures uint8 ``[K,H,W,C]``, one for each seed: picture ``i % K`` for seed ``i``.

    Where the encoder gives a distribution the latent is drawn from it by the seed. ``outside`` ``[K',1,H,W]``: what is
    1 there is grey in the picture that is encoded. Raises ``Unavailable`` for a bundle without an encoder.
    """
    latent = manifest.latent
    scaled = (pictures.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2)
    count = len(pictures) if outside is None else max(len(pictures), len(outside))
    chosen = scaled[np.arange(count) % len(scaled)]
    if outside is not None:
        chosen = chosen * (1 - outside[np.arange(count) % len(outside)])
    rows = np.arange(len(seeds)) % count
    if manifest.decoder.kind == "pixel":
        return np.ascontiguousarray(((chosen - latent.shift) * latent.scaling)[rows], np.float32)
    if encode is None:
        raise Unavailable(
            f"the bundle {manifest.name!r} has no picture encoder, so it can't start from a picture",
            hint="encode it yourself and give its latents: image=float32 [N,C,h,w]; or build the bundle from a whole "
            "pipeline folder",
        )
    mean, std = encode(np.ascontiguousarray(chosen))
    found = mean[rows]
    if std.any():
        found = found + std[rows] * noise_of(seeds, mean.shape[1:], ENCODER_NOISE_STEP)
    if not np.isfinite(found).all():
        raise NotFinite(
            "the encoded picture has NaN or infinity", hint="build again with --precision vae_encoder=fp32 or bf16"
        )
    return np.ascontiguousarray(found, np.float32)


def make_init_image(
    manifest: Manifest,
    encode: Encode | None,
    init: InitOptions,
    seeds: tuple[int, ...],
    shape: tuple[int, ...],
    noise: Array | None,
) -> InitImage:
    """``noise``: the unit noise to mix in, by default that of the ``seeds``. ``shape``: of one image's latent.

    Runs the encoder. Raises ``Unavailable`` for a bundle without one.
    """
    rows, factor, image = np.arange(len(seeds)), manifest.decoder.factor, init.image
    clean = np.asarray(image[rows % len(image)], np.float32)
    if image.dtype.kind == "u":
        clean = _latents_of(manifest, encode, image, seeds)
    small = outside = None
    if init.mask is not None:  # every factor-th pixel, as torch's "nearest"
        small = init.mask[rows % len(init.mask), :, ::factor, ::factor]
        if init.masked_image is not None:
            outside = init.masked_image[rows % len(init.masked_image)]
        elif any(member.inpaints for member in manifest.members.values()):
            outside = _latents_of(manifest, encode, image, seeds, outside=init.mask)
    return InitImage(clean, noise_of(seeds, shape) if noise is None else noise, small, outside)
