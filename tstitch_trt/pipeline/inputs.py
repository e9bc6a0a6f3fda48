"""What a diffusers pipeline makes of its arguments, as arrays for the runtime; noise is drawn in diffusers' order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.checks import shown
from tstitch_engines.errors import BadInput
from tstitch_trt.pipeline.vae_tiles import encode_pictures
from tstitch_trt.runtime.runtime import Runtime

__all__ = [
    "control_picture",
    "encoded",
    "latent_tensor",
    "mask_and_picture",
    "repeat_to",
    "start_picture",
    "step_noise_seeds",
    "unit_noise",
]

Array = NDArray[np.float32]
_BRIGHTEST = 2  # resizing may go beyond 1 a little; whole numbers of 8 or 16 bits go far beyond


def latent_tensor(tensor: Any) -> Array:
    """A tensor of any float type and device as a float32 array."""
    found: Array = np.asarray(tensor.detach().float().cpu().numpy())
    return found


def unit_noise(pipe: Any, shape: Sequence[int], generator: Any) -> Array:
    """Standard normal noise as the pipeline draws it: in its own type, on the generator's device."""
    from diffusers.utils.torch_utils import randn_tensor

    if isinstance(generator, list) and len(generator) != shape[0]:
        raise BadInput(f"{len(generator)} generators for {shape[0]} pictures", hint="give one, or one for each picture")
    return latent_tensor(
        randn_tensor(tuple(shape), generator=generator, device=pipe._execution_device, dtype=pipe.unet.dtype)
    )


def encoded(
    runtime: Runtime, pipe: Any, pictures: Any, generator: Any, *, count: int | None = None, upcast: bool = False
) -> Array:
    """Pictures, a tensor ``[K,3,H,W]`` in [-1, 1], as latents drawn from what the encoder says of them.

    One draw for each picture; with ``count`` one for each of so many, picture ``i % K`` for the i-th. Where each has
    its own generator the i-th draws by the i-th. ``upcast``: the pipeline encodes in float32 whatever its VAE's type.
    An encoder that says one thing alone (tiny autoencoders) draws nothing, so that the generator stays where it was.
    """
    import torch
    from diffusers.utils.torch_utils import randn_tensor

    mean, std = encode_pictures(runtime, pipe.vae, latent_tensor(pictures))
    if count is not None:
        mean, std = repeat_to(mean, count), repeat_to(std, count)
    if not std.any():
        return mean
    each = generator[: len(mean)] if isinstance(generator, list) else generator
    dtype = torch.float32 if upcast else pipe.vae.dtype
    drawn = randn_tensor(mean.shape, generator=each, device=pipe._execution_device, dtype=dtype)
    return np.asarray(mean + std * latent_tensor(drawn), np.float32)


def repeat_to(rows: Array, count: int, what: str = "images") -> Array:
    """``count`` rows, the i-th ``i % K`` of the ``K`` given. Raises ``BadInput`` where they do not come out even."""
    if count % len(rows):
        raise BadInput(
            f"{len(rows)} {what} for {count} pictures; allowed is one, or a number that divides {count}",
            hint=f"give one of the {what} for each picture",
        )
    return np.concatenate([rows] * (count // len(rows)))


def start_picture(pipe: Any, image: Any, height: int | None, width: int | None, latent_channels: int) -> Any:
    """What ``image`` is to the pipeline: pictures float ``[K,3,H,W]`` in [-1, 1], or latents ``[K,C,h,w]``.

    Raises ``BadInput`` for pictures of other channels: the pipeline itself takes four of them for latents, or fails.
    """
    found = _preprocessed(pipe.image_processor, image, "image", height, width).float()
    if found.shape[1] == latent_channels and hasattr(_first(image), "detach"):
        return found
    return _checked(found, image, "image", 3, f", and latents as a tensor [N,{latent_channels},H,W]")


def control_picture(pipe: Any, image: Any, height: int | None, width: int | None, repeats: int) -> Array:
    """The control pictures float32 ``[N,3,H,W]`` in [0, 1]. Raises ``BadInput``."""
    what = "the control picture"
    found = _preprocessed(pipe.control_image_processor, image, what, height, width)
    found = latent_tensor(_checked(found, image, what, 3))
    return found if len(found) == 1 else np.repeat(found, repeats, axis=0)


def mask_and_picture(pipe: Any, mask: Any, picture: Any, height: int, width: int) -> tuple[Array, Any]:
    """The mask ``[N,H,W]`` of 0 and 1, and the picture with grey inside it. Raises ``BadInput``."""
    found = _checked(_preprocessed(pipe.mask_processor, mask, "mask_image", height, width), mask, "mask_image", 1)
    outside = picture * (found < 0.5) if picture.shape[1] == 3 else picture
    return latent_tensor(found)[:, 0], outside


def _first(image: Any) -> Any:
    return image[0] if isinstance(image, list) and image else image


def _preprocessed(processor: Any, picture: Any, what: str, height: int | None, width: int | None) -> Any:
    """What one of the pipeline's processors makes of a picture, a tensor ``[K,C,H,W]``. Raises ``BadInput``."""
    try:
        return processor.preprocess(picture, height=height, width=width)
    except Exception as error:  # of foreign code, about a foreign value
        raise BadInput(
            f"{what} is {shown(picture)}, which the pipeline can't read: {str(error)[:300]}",
            hint="give a PIL image, a numpy array or a tensor, or a list of them",
        ) from error


def _checked(found: Any, given: Any, what: str, channels: int, more: str = "") -> Any:
    """``found``, what the pipeline's processor made of ``given``, where it has these channels and values up to 1."""
    mode = getattr(_first(given), "mode", None)
    is_pil = isinstance(mode, str)
    shown_mode = f" (mode {mode})" if is_pil else ""
    count = found.shape[1]
    if count != channels:
        fix = f"{what.split()[-1]}.convert({'RGB' if channels == 3 else 'L'!r})"
        raise BadInput(
            f"{what} has {count} channel{'s' if count > 1 else ''}{shown_mode}; allowed "
            f"{'are 3 (red, green, blue)' if channels == 3 else 'is 1'}{more}",
            hint=fix if is_pil else f"give an array [N,H,W,{channels}], a tensor [N,{channels},H,W] or a PIL image",
        )
    if (most := float(found.abs().max())) >= _BRIGHTEST:
        raise BadInput(
            f"{what}{shown_mode} has values of {most:g} once the pipeline has read it; allowed is at most 1",
            hint="divide whole numbers by their largest, 255 or 65535, or give a PIL image of 8 bits",
        )
    return found


def step_noise_seeds(generator: Any, count: int) -> tuple[int, ...]:
    """A seed for each picture's own noise in solvers that add some at every step."""
    import torch

    def draw(one: Any, number: int) -> list[int]:
        device = "cpu" if one is None else one.device
        found: list[int] = torch.randint(2**62, (number,), generator=one, device=device).tolist()
        return found

    if isinstance(generator, list):
        return tuple(draw(one, 1)[0] for one in generator)
    return tuple(draw(generator, count))
