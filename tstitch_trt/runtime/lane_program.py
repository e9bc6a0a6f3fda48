"""What one lane runs: the rows of its steps, where it starts, and what each network is given for its image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.device.base import Buffer
from tstitch_engines.device.step_row import FLAG_STORE, ROW
from tstitch_engines.spec import ShapeProfile
from tstitch_trt.plan.plan import Plan
from tstitch_trt.plan.step_rows import with_inpainting
from tstitch_trt.request.controlnet import CONTROLNET
from tstitch_trt.request.limits import Sizes, network_sizes
from tstitch_trt.request.request import Request

__all__ = ["BufferRow", "Inpainting", "LaneProgram", "StepKey", "lane_programs"]


class StepKey(NamedTuple):
    """All that a recorded step depends on. Lanes whose next steps have equal keys can run in one batch.

    ``lanes``: of the batch, spare positions counted; 0 in a program, which may run in any batch. ``size``: height and
    width of the latent. ``sizes``: of the member's dynamic dimensions, empty where it has none; ``control``: the
    ControlNet's, where one runs. ``inpaint``: a picture is kept outside a mask.
    """

    member: str
    lanes: int
    guided: bool
    rescale: bool
    size: tuple[int, int]
    sizes: Sizes = ()
    control: Sizes | None = None
    inpaint: bool = False

    @property
    def networks(self) -> dict[str, Sizes]:
        """The networks that such a step runs, each with its sizes."""
        return {self.member: self.sizes, **({} if self.control is None else {CONTROLNET: self.control})}

    def __str__(self) -> str:
        size = "".join(f", {name} {value}" for name, value in self.sizes)
        given = {"guided": self.guided, "controlled": self.control is not None, "inpainting": self.inpaint}
        more = "".join(f", {word}" for word, true in given.items() if true)
        return f"member {self.member!r}, {self.lanes} lanes{size}{more}"


@dataclass(frozen=True)
class Inpainting:
    """A picture kept outside a lane's mask, float32: ``image`` and ``noise`` ``[C,H,W]``, ``mask [1,H,W]``."""

    image: NDArray[np.float32]
    mask: NDArray[np.float32]
    noise: NDArray[np.float32]


@dataclass(frozen=True)
class BufferRow:
    """Row ``index`` of latents ``[N,C,H,W]`` that lie on the device."""

    buffer: Buffer
    index: int


@dataclass(frozen=True)
class LaneProgram:
    """One image's trajectory, independent of the slot and the batches that it runs in.

    ``rows`` float32 ``[N,25]`` and ``keys``, one for each step, of which those from ``start`` on run. ``scale *
    latents`` (float32 ``[C,H,W]``, on the host or on the device) is the state before ``start``; ``None`` draws the
    latents by ``seed``. ``conditioning``: network -> input -> the conditional and the unconditional half's row.
    """

    rows: NDArray[np.float32]
    seed: int
    start: int
    keys: tuple[StepKey, ...]
    scale: float = 1.0
    latents: NDArray[np.float32] | BufferRow | None = None
    conditioning: Mapping[str, Mapping[str, tuple[NDArray[Any], NDArray[Any]]]] = field(default_factory=dict)
    inpainting: Inpainting | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the latent."""
        return self.keys[0].size

    @property
    def guided(self) -> bool:
        return any(key.guided for key in self.keys[self.start :])


def lane_programs(
    manifest: Manifest,
    profiles: Mapping[str, ShapeProfile],
    plan: Plan,
    request: Request,
    images: range,
    *,
    store_estimates: bool = False,
) -> list[LaneProgram]:
    """The programs of these images of the request. ``profiles``: of each member's engine and the ControlNet's.

    ``store_estimates``: every step's estimate goes into the history, for previews. Raises ``OutOfProfile``.
    """
    keys = _keys(manifest, profiles, plan, request)
    inpainted = np.array([key.inpaint for key in keys])
    rows = np.where(inpainted[:, None], with_inpainting(plan.rows, given_noise=True), plan.rows).astype(np.float32)
    if store_estimates:
        flags = rows[:, ROW["FLAGS"]].astype(np.int64) | FLAG_STORE
        rows[:, ROW["FLAGS"]] = flags.astype(np.float32)
    used = {name for key in keys[request.start :] for name in key.networks}
    networks = {name: values for name, values in request.conditioning.networks.items() if name in used}
    picture = request.picture if any(key.inpaint for key in keys[request.start :]) else None
    programs = []
    for image in images:
        latents: NDArray[np.float32] | BufferRow | None = None
        if isinstance(request.latents, np.ndarray):
            latents = request.latents[image]
        elif request.latents is not None:
            latents = BufferRow(request.latents, image)
        inpainting = None
        if picture is not None and picture.mask is not None:
            inpainting = Inpainting(picture.clean[image], picture.mask[image], picture.noise[image])
        programs.append(
            LaneProgram(
                rows,
                request.seeds[image],
                request.start,
                keys,
                plan.init_scale if request.from_noise else 1.0,
                latents,
                {name: {key: v.row(image) for key, v in values.items()} for name, values in networks.items()},
                inpainting,
            )
        )
    return programs


def _keys(
    manifest: Manifest, profiles: Mapping[str, ShapeProfile], plan: Plan, request: Request
) -> tuple[StepKey, ...]:
    masked = request.picture is not None and request.picture.mask is not None

    def sizes(name: str) -> Sizes:
        return network_sizes(name, profiles[name], *request.size, request.conditioning.tokens(name))

    def key(name: str, guided: bool) -> StepKey:
        member = manifest.members[name]
        # A member that paints into a picture is given the picture; for any other the picture is put back.
        return StepKey(
            name,
            0,
            guided,
            guided and plan.rescale,
            request.size,
            sizes(name),
            sizes(CONTROLNET) if request.control and member.controlled else None,
            masked and not member.inpaints,
        )

    steps = list(zip(plan.schedule.names, plan.guided, strict=True))
    made = {step: key(*step) for step in dict.fromkeys(steps)}
    return tuple(made[step] for step in steps)
