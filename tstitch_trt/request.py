"""A checked request: labels, seeds and starting latents, one per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.device import Buffer
from tstitch_engines.errors import BadInput, NotFinite
from tstitch_engines.manifest import Manifest
from tstitch_engines.rows import ROW
from tstitch_trt.plan import Plan

__all__ = ["Request", "host_array"]

_SEED_LIMIT = 2**64


@dataclass(frozen=True)
class Request:
    """``labels`` and ``seeds`` have one entry per image; ``latents`` float32 ``[N,C,H,W]``, a device buffer or none."""

    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    latents: NDArray[np.float32] | Buffer | None
    start: int

    @property
    def n(self) -> int:
        return len(self.labels)

    @staticmethod
    def make(
        manifest: Manifest,
        *,
        labels: int | Sequence[int] | None,
        n: int | None,
        seed: int,
        seeds: Sequence[int] | None,
        latents: NDArray[np.generic] | Buffer | None,
        start: int,
    ) -> Request:
        """Raises ``BadInput`` for anything that does not fit together."""
        classes = manifest.conditioning.classes
        wanted = list(range(classes)) if labels is None else [labels] if isinstance(labels, int) else list(labels)
        counts = {
            "n": n,
            "seeds": None if seeds is None else len(seeds),
            "latents": None if latents is None or not latents.shape else latents.shape[0],
        }
        given = {name: count for name, count in counts.items() if count is not None}
        count = next(iter(given.values()), 1 if labels is None else len(wanted))
        if len(set(given.values())) > 1:
            raise BadInput(
                "these do not agree on the number of images: " + ", ".join(f"{k}: {v}" for k, v in given.items()),
                hint="give one seed and one latent per image, or leave n out",
            )
        if count < 1 or not wanted:
            raise BadInput(
                f"{count} images of {len(wanted)} labels: nothing to draw", hint="ask for at least one, e.g. n=1"
            )
        for label in wanted:
            if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label < classes:
                raise BadInput(
                    f"label {label!r} is out of range; allowed is 0 to {classes - 1}",
                    hint=f"e.g. --labels 0-{classes - 1} or labels=[0, {classes - 1}]",
                )
        chosen = [seed + i for i in range(count)] if seeds is None else list(seeds)
        for value in chosen:
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < _SEED_LIMIT:
                raise BadInput(
                    f"seed {value!r} is out of range; allowed are whole numbers from 0 to 2**64 - 1",
                    hint="e.g. --seed 0",
                )
        return Request(
            tuple(int(wanted[i % len(wanted)]) for i in range(count)),
            tuple(int(value) for value in chosen),
            None if latents is None else _check_latents(manifest, latents),
            start,
        )

    def check_start(self, plan: Plan) -> None:
        """A trajectory can be entered in the middle where no row reads estimates from before."""
        if self.start == 0:
            return
        if not 0 <= self.start < len(plan.schedule):
            raise BadInput(
                f"start_step {self.start} is outside 0..{len(plan.schedule) - 1}", hint="0 starts from noise"
            )
        if self.latents is None:
            raise BadInput(
                f"start_step {self.start} without latents: there is no state to start from",
                hint="pass latents= with the state before that step, or start_step=0",
            )
        first, second = plan.rows[self.start], plan.rows[min(self.start + 1, len(plan.rows) - 1)]
        if first[ROW["C"]] != 0 or first[ROW["E"]] != 0 or (self.start + 1 < len(plan.rows) and second[ROW["E"]] != 0):
            raise BadInput(
                f"start_step {self.start}: the solver needs the estimates of the steps before",
                hint="use a single-step solver (ddim, ddpm, euler, lcm) to enter a trajectory in the middle",
            )


def host_array(array: Any) -> NDArray[np.generic]:
    """``array`` as a numpy array, without a copy where it can be. Raises ``BadInput``."""
    try:
        if hasattr(array, "__dlpack__") and not isinstance(array, (np.ndarray, np.generic)):
            viewed: NDArray[np.generic] = np.from_dlpack(array)
            return viewed
        return np.asarray(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise BadInput(
            f"a {type(array).__name__} can't be read as latents: {error}",
            hint="pass float32 [N,C,H,W]: a numpy array, or in torch tensor.detach()",
        ) from error


def _check_latents(manifest: Manifest, latents: NDArray[np.generic] | Buffer) -> NDArray[np.float32] | Buffer:
    """What lies on the device is not looked into: the steps find what is not finite."""
    latent = manifest.latent
    want = (latent.channels, latent.height, latent.width)
    on_host = isinstance(latents, np.ndarray)
    number = np.issubdtype(latents.dtype, np.floating) if on_host else latents.dtype == "float32"
    if len(latents.shape) != 4 or latents.shape[1:] != want or not number:
        raise BadInput(
            f"latents are {latents.dtype}{list(latents.shape)}; needed is float32[N, {', '.join(map(str, want))}]",
            hint="give one [C,H,W] array of standard normal noise per image",
        )
    if not isinstance(latents, np.ndarray):
        return latents
    checked = np.ascontiguousarray(latents, np.float32)
    if not np.isfinite(checked).all():
        bad = int(np.flatnonzero(~np.isfinite(checked).reshape(len(checked), -1).all(axis=1))[0])
        raise NotFinite(
            f"NaN or infinity in the latents given for image {bad}, before the first step",
            hint="check the file or array that was passed as latents",
        )
    return checked
