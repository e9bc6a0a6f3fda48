"""A checked request: what each image is given, its seed, and where its trajectory starts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.device.base import Buffer
from tstitch_trt.plan.plan import Plan
from tstitch_trt.request.arrays import ForeignLatents
from tstitch_trt.request.conditioning import Conditioning, Values, class_values, guidance_embedding
from tstitch_trt.request.controlnet import CONTROLNET, control_values
from tstitch_trt.request.init_image import Encode, InitImage, make_init_image
from tstitch_trt.request.parse import ParsedRequest
from tstitch_trt.request.text import Texts, text_values

__all__ = ["Request"]


@dataclass(frozen=True)
class Request:
    """``seeds`` have one entry per image, so do ``labels`` of a class bundle and ``prompts`` where there are any.

    ``latents`` float32 ``[N,C,H,W]``, a device buffer or none: the state before step ``start``, or the unit noise to
    start from when ``from_noise``. ``control``: a ControlNet runs beside the members that take one. ``picture``: what
    the trajectory starts from, if it does.
    """

    labels: tuple[int, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    size: tuple[int, int]  # height and width of the latent
    latents: NDArray[np.float32] | Buffer | None
    start: int
    from_noise: bool
    conditioning: Conditioning
    control: bool = False
    picture: InitImage | None = None

    @property
    def n(self) -> int:
        return len(self.seeds)

    @staticmethod
    def make(
        manifest: Manifest,
        parsed: ParsedRequest,
        plan: Plan,
        *,
        texts: Texts | None = None,
        encode: Encode | None = None,
    ) -> Request:
        """Encodes prompts and pictures, which runs engines. ``ParsedRequest.check`` was passed with this plan.

        Raises ``Unavailable`` where an encoder is missing, ``BadInput`` for embeddings that do not fit a member.
        """
        assert not isinstance(parsed.latents, ForeignLatents), "the runtime borrows them before"
        start, latents, from_noise, picture = plan.start, parsed.latents, plan.start == 0, None
        if parsed.init is not None:
            noise = latents if isinstance(latents, np.ndarray) else None
            shape = (manifest.latent.channels, *parsed.size)
            picture = make_init_image(manifest, encode, parsed.init, parsed.seeds, shape, noise)
            # With a mask and all steps to run, nothing of the picture is left in the noise, as in diffusers.
            from_noise = start == 0 and picture.mask is not None
            a, s = float(plan.table.a[start]), float(plan.table.s[start])
            latents = picture.noise if from_noise else picture.state(a, s)
        return Request(
            parsed.labels,
            tuple(parsed.prompts[i % len(parsed.prompts)] for i in range(parsed.n)) if parsed.prompts else (),
            parsed.seeds,
            parsed.size,
            latents,
            start,
            from_noise,
            _conditioning(manifest, plan, parsed, texts, picture),
            parsed.control is not None,
            picture,
        )


def _conditioning(
    manifest: Manifest, plan: Plan, parsed: ParsedRequest, texts: Texts | None, picture: InitImage | None
) -> Conditioning:
    names = list(dict.fromkeys(plan.schedule.names))
    networks: dict[str, dict[str, Values]]
    if manifest.conditioning.kind == "class":
        shared = class_values(manifest, parsed.labels)
        networks = {name: {"labels": shared} for name in names}
    else:
        height, width = (side * manifest.decoder.factor for side in parsed.size)
        networks = text_values(manifest, names, parsed, texts, guided=any(plan.guided), pixels=(height, width))
    for name in names:
        member = manifest.members[name]
        if name in plan.embedded:
            networks[name]["timestep_cond"] = Values(guidance_embedding(plan.embedded[name], member.guidance_embedding))
        if member.inpaints:
            assert picture is not None, "ParsedRequest.check was passed"
            assert picture.mask is not None, "ParsedRequest.check was passed"
            assert picture.outside is not None, "it goes with a mask where a member paints"
            outside = np.float32(member.latent_ratio) * picture.outside
            networks[name]["inpaint"] = Values(np.concatenate([picture.mask, outside], axis=1))
    if parsed.control is not None:
        networks[CONTROLNET] = control_values(manifest, names, parsed.control, parsed.control_scale, networks)
    conditioning = Conditioning(networks)
    conditioning.check(manifest)
    return conditioning
