"""What a diffusers pipeline makes of its arguments, as arrays for the runtime; noise is drawn in diffusers' order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.checks import shown
from tstitch_engines.errors import BadInput
from tstitch_trt.runtime.runtime import Runtime

__all__ = [
    "control_picture",
    "encoded",
    "latent_tensor",
    "mask_and_picture",
    "preprocessed",
    "repeat_to",
    "step_noise_seeds",
    "unit_noise",
]

Array = NDArray[np.float32]


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

    mean, std = runtime.encode(latent_tensor(pictures))
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


def preprocessed(processor: Any, picture: Any, what: str, height: int | None, width: int | None) -> Any:
    """What one of the pipeline's processors makes of a picture, a tensor ``[K,C,H,W]``. Raises ``BadInput``."""
    try:
        return processor.preprocess(picture, height=height, width=width)
    except Exception as error:  # of foreign code, about a foreign value
        raise BadInput(
            f"{what} is {shown(picture)}, which the pipeline can't read: {str(error)[:300]}",
            hint="give a PIL image, a numpy array or a tensor, or a list of them",
        ) from error


def control_picture(pipe: Any, image: Any, height: int | None, width: int | None, repeats: int) -> Array:
    """The control pictures float32 ``[N,3,H,W]`` in [0, 1]."""
    found = latent_tensor(preprocessed(pipe.control_image_processor, image, "the control picture", height, width))
    return found if len(found) == 1 else np.repeat(found, repeats, axis=0)


def mask_and_picture(pipe: Any, mask: Any, picture: Any, height: int, width: int) -> tuple[Array, Any]:
    """The mask ``[N,H,W]`` of 0 and 1, and the picture with grey inside it."""
    found = preprocessed(pipe.mask_processor, mask, "mask_image", height, width)
    outside = picture * (found < 0.5) if picture.shape[1] == 3 else picture
    return latent_tensor(found)[:, 0], outside


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
