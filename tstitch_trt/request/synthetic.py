"""Made-up requests for timing, recording and calibration, where the contents of the images do not matter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_trt.plan.plan import Plan
from tstitch_trt.request.conditioning import conditioning_inputs
from tstitch_trt.request.controlnet import CONTROLNET
from tstitch_trt.request.options import ImageKeywords

__all__ = [
    "PROMPTS",
    "reads_prompts",
    "synthetic_conditioning",
    "synthetic_painting",
    "synthetic_pictures",
    "synthetic_request",
]

PROMPTS: Final = (
    "a photograph of a red fox in the snow",
    "an oil painting of a harbour at dusk",
    "a portrait of an old sailor, studio lighting, highly detailed",
    "a bowl of oranges on a wooden table, soft light",
    "a city street at night in the rain, neon signs, reflections",
    "a watercolour of mountains behind a lake",
    "a small robot reading a book in a library, digital art",
    "an aerial view of a river delta",
    "a cat asleep on a window sill",
    "a castle on a cliff, fantasy illustration, dramatic sky",
    "a macro photograph of a bee on a sunflower",
    "a minimalist poster with geometric shapes in blue and yellow",
    "a crowd at a market, street photography, black and white",
    "an astronaut on a beach",
    "the interior of a cathedral, wide angle",
    "a plate of sushi",
)
"""Prompts of many kinds and lengths, like those that users draw from."""


def synthetic_request(
    manifest: Manifest,
    backend: str,
    plan: Plan,
    count: int,
    *,
    prompts: Sequence[str] = (),
    control: bool = False,
    size: tuple[int, int] | None = None,
) -> ImageKeywords:
    """Keywords of ``Runtime.sample`` for ``count`` images: classes in turn, or text, which is made up for each member.

    Texts are ``prompts`` in turn where the bundle reads them, else random embeddings of as many tokens as the engines
    of ``backend`` are tuned for, so that no text encoder is to be waited for. Where the plan has a member that paints
    into a picture, a picture and a mask for its left half; with ``control`` a control picture, where something takes
    it. ``size``: height and width of the latent, by default the bundle's own.
    """
    if manifest.conditioning.kind == "class":
        return {"labels": [i % manifest.conditioning.classes for i in range(count)]}
    names = list(dict.fromkeys(plan.schedule.names))
    asked: ImageKeywords = {"n": count}
    if prompts and reads_prompts(manifest, names):
        asked["prompt"] = list(prompts)
    else:
        asked |= _embeddings(manifest, names, backend, guided=any(plan.guided))
    members = [manifest.members[name] for name in names]
    height, width = (side * manifest.decoder.factor for side in size or (manifest.latent.height, manifest.latent.width))
    if any(member.inpaints for member in members):
        asked |= synthetic_painting(1, height, width)
    if control and CONTROLNET in manifest.parts and any(member.controlled for member in members):
        asked["control"] = synthetic_pictures(1, height, width, seed=1)
    return asked


def reads_prompts(manifest: Manifest, names: Iterable[str]) -> bool:
    """Whether a text bundle has the text encoders of the members ``names``."""
    texts = [text for name in names if (text := manifest.members[name].text) is not None]
    encoders = {encoder for text in texts for encoder in text.encoders}
    return bool(texts) and all(text.hidden for text in texts) and encoders <= set(manifest.parts)


def synthetic_painting(count: int, height: int, width: int) -> ImageKeywords:
    """``count`` pictures whose left half is painted anew."""
    mask = np.zeros((height, width), np.bool_)
    mask[:, : width // 2] = True
    return {"image": synthetic_pictures(count, height, width), "mask": mask, "strength": 1.0}


def synthetic_pictures(count: int, height: int, width: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth pictures uint8 ``[count,height,width,3]``, each another: what a picture encoder may well be given."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    waves = rng.uniform(1, 9, (3, 4, count, 3))  # frequencies along y and x and phases, of four waves
    total = sum(
        np.sin(a * y[None, ..., None] + b * x[None, ..., None] + c)
        for a, b, c in (waves[:, index, :, None, None, :] for index in range(4))
    )
    return np.asarray(np.clip(127.5 + 50 * total, 0, 255).astype(np.uint8))


def _embeddings(manifest: Manifest, names: Sequence[str], backend: str, *, guided: bool) -> ImageKeywords:
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, NDArray[np.float32]]] = {}
    for name in names:
        text = manifest.members[name].text
        if text is None:
            continue
        shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (1, _tokens(manifest, name, backend), text.width)}
        if text.pooled_width:
            shapes["pooled_prompt_embeds"] = (1, text.pooled_width)
        if guided:
            shapes |= {f"negative_{key}": shape for key, shape in shapes.items()}
        for key, shape in shapes.items():
            found.setdefault(key, {})[name] = rng.standard_normal(shape, np.float32)
    return cast(ImageKeywords, found)


def _tokens(manifest: Manifest, name: str, backend: str) -> int:
    member = manifest.members[name]
    size = next(spec.shape[1] for spec in member.inputs if spec.name == "encoder_hidden_states")
    if isinstance(size, int):
        return size
    records = sorted(member.engines, key=lambda record: record.identity.backend != backend)
    return records[0].identity.profile.dims["T"].opt


def synthetic_conditioning(
    manifest: Manifest, name: str, sizes: Mapping[str, int], variant: int
) -> dict[str, NDArray[Any]]:
    """Made-up values of a network's conditioning inputs, other ones for each ``variant``, for trials and timing."""
    network = manifest.networks()[name]
    rng = np.random.default_rng(variant)
    found: dict[str, NDArray[Any]] = {}
    for spec in network.inputs:
        if spec.name not in conditioning_inputs(network):
            continue
        shape = spec.resolve(sizes)
        if spec.dtype == "int64":
            found[spec.name] = (variant + np.arange(shape[0])) % max(1, manifest.conditioning.classes)
        else:
            found[spec.name] = rng.standard_normal(shape, np.float32)
    return found
