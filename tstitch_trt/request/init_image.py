"""Where a trajectory starts other than from noise: a picture, encoded and noised to a step, and what of it stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.device.base import Buffer
from tstitch_engines.device.step_row import INITIAL_NOISE_STEP
from tstitch_engines.errors import BadInput, NotFinite, Unavailable
from tstitch_trt.request.options import PictureWishes

__all__ = [
    "ENCODER_NOISE_STEP",
    "Encoder",
    "InitImage",
    "as_pictures",
    "check_start_wishes",
    "make_start",
    "noise_of",
    "read_control",
    "read_image",
    "start_step",
]

Array = NDArray[np.float32]
Pixels = NDArray[np.uint8]

ENCODER_NOISE_STEP = INITIAL_NOISE_STEP - 1  # the Philox "step" of the encoder's own noise


class Encoder(Protocol):
    """The picture encoder of a bundle."""

    def encode(self, pictures: Array) -> tuple[Array, Array]:
        """Pictures float32 ``[N,3,H,W]`` in [-1, 1] to mean and standard deviation of their latents ``[N,C,h,w]``."""


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


def check_start_wishes(wishes: PictureWishes) -> None:
    """Raises ``BadInput`` for wishes that need a picture and have none, and for two beginnings at once."""
    if wishes.get("image") is None:
        for name in ("strength", "mask", "masked_image"):
            if wishes.get(name) is not None:
                raise BadInput(f"{name} was given without a picture", hint="add the picture: image= (--image FILE)")
        return
    if wishes.get("start_step"):
        raise BadInput(
            f"both image and start_step {wishes['start_step']} say where to start",
            hint="with a picture strength says how much of the trajectory runs (--strength)",
        )
    strength = wishes.get("strength")
    if strength is not None and not 0 < strength <= 1:
        raise BadInput(
            f"strength {strength:g}; allowed is above 0 up to 1",
            hint="0.3 changes little, 0.8 much; e.g. --strength 0.6",
        )


def start_step(wishes: PictureWishes, steps: int) -> int:
    """The first step that runs from a picture, as diffusers counts it: the last ``int(steps strength)`` steps run.

    ``strength`` is 0.8 where nothing is said, and 1 with a mask. Raises ``BadInput`` where no step is left.
    """
    strength = wishes.get("strength")
    if strength is None:
        strength = 0.8 if wishes.get("mask") is None else 1.0
    running = min(int(steps * strength), steps)
    if running < 1:
        raise BadInput(
            f"strength {strength:g} of {steps} steps leaves no step to run",
            hint=f"use at least {1 / steps:.2g}, or more steps",
        )
    return steps - running


def noise_of(seeds: tuple[int, ...], shape: tuple[int, ...], step: int = INITIAL_NOISE_STEP) -> Array:
    """The unit Gaussian noise of each seed, float32 ``[N, *shape]``, as the lanes draw it."""
    from tstitch_engines.device.host_kernels import normal

    size = int(np.prod(shape))
    return np.stack([normal(seed, step, size).reshape(shape) for seed in seeds])


def as_pictures(value: Any, *, what: str, channels: int) -> Pixels:
    """One picture or several as uint8 ``[N,H,W,channels]``. Raises ``BadInput``."""
    pixels = np.asarray(value)
    if pixels.ndim == 2 or (pixels.ndim == 3 and channels == 1 and pixels.shape[-1] != 1):
        pixels = pixels[..., None]
    if pixels.ndim == 3:
        pixels = pixels[None]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != channels or not pixels.size:
        raise BadInput(
            f"{what} is {pixels.dtype}{list(np.shape(value))}; needed is uint8 [H,W,{channels}] or [N,H,W,{channels}]",
            hint="numpy.asarray(picture.convert('RGB')) makes that of a PIL image",
        )
    return np.ascontiguousarray(pixels)


def _as_masks(value: Any, *, size: tuple[int, int]) -> Array:
    """One mask or several as float32 ``[N,1,H,W]`` of 0 and 1 (paint anew). ``size``: height and width in pixels."""
    mask = np.asarray(value)
    if mask.ndim in (3, 4) and mask.shape[-1] == 1:
        mask = mask[..., 0]
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3 or mask.dtype.kind not in "bfu":
        raise BadInput(
            f"mask is {mask.dtype}{list(np.shape(value))}; needed is [H,W] or [N,H,W] of bool, uint8 or floats in 0..1",
            hint="numpy.asarray(picture.convert('L')) makes that of a PIL image",
        )
    if mask.shape[1:] != size:
        raise BadInput(
            f"the mask is {mask.shape[2]}x{mask.shape[1]} pixels, the picture {size[1]}x{size[0]}; both must be equal",
            hint="resize the mask to the picture's size",
        )
    half = 128 if mask.dtype.kind == "u" else 0.5
    return np.asarray(mask if mask.dtype.kind == "b" else mask >= half)[:, None].astype(np.float32)


def _encode(
    manifest: Manifest,
    encoder: Encoder | None,
    pictures: Pixels,
    seeds: tuple[int, ...],
    *,
    outside: Array | None = None,
) -> Array:
    """The latents of pictures ``[K,H,W,C]``, one for each seed: picture ``i % K`` for seed ``i``.

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
    if encoder is None:
        raise Unavailable(
            f"the bundle {manifest.name!r} has no picture encoder, so it can't start from a picture",
            hint="encode it yourself and give its latents: image=float32 [N,C,h,w]; or build the bundle from a whole "
            "pipeline folder",
        )
    mean, std = encoder.encode(np.ascontiguousarray(chosen))
    found = mean[rows]
    if std.any():
        found = found + std[rows] * noise_of(seeds, mean.shape[1:], ENCODER_NOISE_STEP)
    if not np.isfinite(found).all():
        raise NotFinite(
            "the encoded picture has NaN or infinity", hint="build again with --precision vae_encoder=fp32 or bf16"
        )
    return np.ascontiguousarray(found, np.float32)


def read_image(image: Any, channels: int) -> NDArray[Any] | None:
    """Pictures uint8 ``[N,H,W,channels]``, or latents float32 ``[N,C,H,W]``."""
    if image is None:
        return None
    array = np.asarray(image)
    if array.dtype.kind == "f" and array.ndim == 4:
        if not np.isfinite(array).all():
            raise NotFinite("NaN or infinity in the latents given as image", hint="check what encoded them")
        return np.ascontiguousarray(array, np.float32)
    return as_pictures(array, what="image", channels=channels)


def read_control(control: Any) -> Array | None:
    """Control pictures, uint8 ``[N,H,W,3]`` or float ``[N,3,H,W]`` in [0, 1], as the latter. Raises ``BadInput``."""
    if control is None:
        return None
    array = np.asarray(control)
    if array.dtype.kind == "f" and array.ndim == 4 and array.shape[1] == 3:
        if not (array.size and array.min() >= 0 and array.max() <= 1):
            raise BadInput("control is floats that are not all from 0 to 1", hint="scale it: black is 0 and white is 1")
        return np.ascontiguousarray(array, np.float32)
    pixels = as_pictures(array, what="control", channels=3)
    return np.ascontiguousarray(pixels.astype(np.float32).transpose(0, 3, 1, 2) / 255)


def make_start(
    manifest: Manifest,
    encoder: Encoder | None,
    wishes: PictureWishes,
    pictures: NDArray[Any],
    seeds: tuple[int, ...],
    size: tuple[int, int],
    latents: NDArray[np.float32] | Buffer | None,
) -> InitImage:
    """The start of a request. ``latents``: the noise to mix in, by default that of the ``seeds``. Runs the encoder."""
    shape = (manifest.latent.channels, *size)
    factor = manifest.decoder.factor
    masks = None
    if wishes.get("mask") is not None:
        masks = _as_masks(wishes["mask"], size=(size[0] * factor, size[1] * factor))
    outside = None
    if pictures.dtype.kind == "f":
        if pictures.shape[1:] != shape:
            raise BadInput(
                f"image is float32{list(pictures.shape)}, taken as latents; "
                f"needed is [N, {', '.join(map(str, shape))}]",
                hint="give pictures as uint8 [N,H,W,3]",
            )
        clean = pictures[np.arange(len(seeds)) % len(pictures)]
    else:
        clean = _encode(manifest, encoder, pictures, seeds)
    inpainting = any(member.inpaints for member in manifest.members.values())
    if wishes.get("masked_image") is not None and not (inpainting and masks is not None):
        raise BadInput(
            "masked_image was given, and " + ("no mask" if inpainting else "no member of this bundle takes it"),
            hint="add mask="
            if inpainting
            else "leave it out: the picture outside the mask is put back after each step",
        )
    if masks is not None and inpainting:
        outside = _outside(manifest, encoder, wishes, pictures, seeds, masks, shape)
    small = None
    if masks is not None:  # every factor-th pixel, as torch's "nearest"
        small = masks[np.arange(len(seeds)) % len(masks), :, ::factor, ::factor]
    if isinstance(latents, np.ndarray):
        noise = latents
    elif latents is None:
        noise = noise_of(seeds, shape)
    else:
        raise BadInput("latents on the device can't be mixed with a picture", hint="pass them as a numpy array")
    return InitImage(clean, noise, small, outside)


def _outside(
    manifest: Manifest,
    encoder: Encoder | None,
    wishes: PictureWishes,
    pictures: NDArray[Any],
    seeds: tuple[int, ...],
    masks: Array,
    shape: tuple[int, ...],
) -> Array:
    """The latents of the pictures with what is painted anew greyed out: as given, or encoded."""
    given = wishes.get("masked_image")
    if given is not None:
        found = np.asarray(given)
        if found.dtype.kind != "f" or found.ndim != 4 or found.shape[1:] != shape or not np.isfinite(found).all():
            raise BadInput(
                f"masked_image is {found.dtype}{list(found.shape)}; needed are finite latents, float32 "
                f"[N, {', '.join(map(str, shape))}]",
                hint="encode the picture with grey where it is painted anew, or leave it out and give image= as uint8",
            )
        return np.ascontiguousarray(found[np.arange(len(seeds)) % len(found)], np.float32)
    if pictures.dtype.kind == "f":
        raise BadInput(
            "image is latents, and a member that paints into a picture needs the picture itself",
            hint="give image= as uint8 [N,H,W,3], or masked_image= too: latents with grey where it is painted anew",
        )
    return _encode(manifest, encoder, pictures, seeds, outside=masks)
