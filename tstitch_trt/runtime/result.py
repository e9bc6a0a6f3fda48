"""What comes back from sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import BadInput, NotFinite
from tstitch_trt.plan.plan import Plan
from tstitch_trt.plan.schedule import Schedule
from tstitch_trt.runtime.chooser import ChosenSchedule

__all__ = ["Decode", "FailedImage", "Result", "SegmentTiming", "StepEvent", "not_finite"]

Decode = Callable[[NDArray[np.float32]], NDArray[np.uint8]]
T = TypeVar("T")


class _Read(Protocol):
    """Calls what reads the runtime's memory, or raises where that has gone on."""

    def __call__(self, work: Callable[[], T], /) -> T: ...


def _at_once(work: Callable[[], T], /) -> T:
    return work()


@dataclass(frozen=True)
class SegmentTiming:
    """Milliseconds spent in one segment of the schedule, summed over the chunks of the batch."""

    member: str
    steps: int
    ms: float


@dataclass(frozen=True)
class StepEvent:
    """One step is done. ``step`` counts from 1 to ``steps``; a large batch runs in ``chunks``, one after another.

    Its latents are those of the runtime until the next step: its methods raise ``BadInput`` when the request has gone
    on or is done, and ``Cancelled`` when the runtime was closed.
    """

    step: int
    steps: int
    chunk: int
    chunks: int
    member: str
    timestep: float
    _latents: Callable[[], NDArray[np.float32]]
    _estimate: Callable[[], NDArray[np.float32]]
    _decode: Decode
    _read: _Read = _at_once

    def latents(self) -> NDArray[np.float32]:
        """The state after this step, float32 ``[B,C,H,W]`` of this chunk. Waits for the device."""
        return self._read(self._latents)

    def estimate(self) -> NDArray[np.float32]:
        """The denoised estimate D of this step, float32 ``[B,C,H,W]``. Waits for the device."""
        return self._read(self._estimate)

    def preview(self) -> NDArray[np.uint8]:
        """The estimate as pictures, uint8 ``[B,H,W,C]``. Raises ``Unavailable`` for a bundle without a decoder."""
        return self._read(lambda: self._decode(self._estimate()))


@dataclass(frozen=True)
class FailedImage:
    """Image ``image`` of a request (from 0), which was not drawn.

    ``step``: the one (from 1) after which its latents held NaN or infinity, and ``member`` what made them; step 0: its
    picture did, and ``member`` is the decoder. Without a ``member`` the request ended before it was drawn.
    """

    image: int
    seed: int
    step: int
    member: str

    def __str__(self) -> str:
        if not self.member:
            return f"image {self.image} (seed {self.seed}): the request ended before"
        where = f"the latents after step {self.step}" if self.step else "the picture"
        return f"image {self.image} (seed {self.seed}): NaN or infinity in {where}, made by {self.member!r}"


@dataclass(frozen=True, repr=False)
class Result:
    """``images`` uint8 ``[N,H,W,C]``, ``None`` when not decoded; ``labels`` or ``prompts``: what each was asked to be.

    ``failed``: the images that were not drawn, where partial results were asked for and in ``NotFinite.result``. They
    keep their place: the latents there are NaN (on the device not finite) and the picture is black. ``drawn`` has the
    places of the others.

    ``loras``: those that were in the engines by ``Runtime.swap_lora``, ``{"large": "style.safetensors:0.8"}``.

    ``budget``: how the schedule was chosen, where a latency budget was given.

    ``total_ms`` is the time of the trajectories alone, without decoding: the sum of ``timings``.
    """

    images: NDArray[np.uint8] | None
    _latents: NDArray[np.float32] | None
    seeds: tuple[int, ...]
    labels: tuple[int, ...]
    plan: Plan
    timings: tuple[SegmentTiming, ...]
    _device_latents: Any = None
    prompts: tuple[str, ...] = ()
    loras: Mapping[str, str] = field(default_factory=dict)
    budget: ChosenSchedule | None = None
    failed: tuple[FailedImage, ...] = ()

    def __repr__(self) -> str:
        shape = "" if self.images is None else f", each {'x'.join(map(str, self.images.shape[1:]))}"
        bad = f", {len(self.failed)} of them failed" if self.failed else ""
        return f"<Result: {len(self.seeds)} images{shape}{bad}; {self.schedule}; {self.total_ms:.0f} ms>"

    @property
    def drawn(self) -> tuple[int, ...]:
        failed = {each.image for each in self.failed}
        return tuple(image for image in range(len(self.seeds)) if image not in failed)

    @property
    def on_host(self) -> bool:
        """Whether nothing of it lies on the device."""
        return self._device_latents is None

    @property
    def latents(self) -> NDArray[np.float32]:
        """float32 ``[N,C,H,W]``. Raises ``BadInput`` when they were left on the device."""
        if self._latents is None:
            raise BadInput(
                "these latents were left on the device (output='device')",
                hint="use result.device_latents, or sample with output='host'",
            )
        return self._latents

    @property
    def device_latents(self) -> Any:
        """float32 ``[N,C,H,W]`` on the runtime's device, with ``__dlpack__`` (a numpy array on cpu).

        On CUDA with ``__cuda_array_interface__`` too. It is this result's own memory and complete: no stream has to be
        waited for. It is freed with the result and what was made of it, after the work that the stream which took it by
        DLPack has by then; one that took it by ``__cuda_array_interface__`` must be done. Raises ``BadInput`` without
        ``output='device'``.
        """
        if self._device_latents is None:
            raise BadInput("these latents are on the host", hint="sample with output='device', or use result.latents")
        return self._device_latents

    @property
    def schedule(self) -> Schedule:
        return self.plan.schedule

    @property
    def total_ms(self) -> float:
        return sum(part.ms for part in self.timings)


def not_finite(plan: Plan, failed: Sequence[FailedImage], count: int) -> NotFinite:
    """The error for those of ``count`` images that failed. It tells of the first."""
    first, steps = failed[0], len(plan.schedule)
    if first.step:
        where = f"the latents after step {first.step} of {steps}"
        when = f"timestep {plan.table.t[first.step - 1]:g}, "
    else:
        where, when = "the picture", ""
    made_by = f"member {first.member!r}" if first.step else repr(first.member)
    error = NotFinite(
        f"NaN or infinity in {where}, made by {made_by} ({when}seed {first.seed}; {len(failed)} of {count} lanes)",
        hint=f"if {first.member!r} is an fp16 engine, build it with --precision {first.member}=fp32 or bf16; "
        "otherwise check its checkpoint and prediction type with: tstitch-trt inspect BUNDLE"
        + ("; --partial (partial=True) draws the other images" if len(failed) < count else ""),
    )
    error.failed = tuple(failed)
    return error
