"""The contenders of ``benchmarks/peers.py``: the members of a bundle, walked by this package and by others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import tstitch_trt
from gpubench.diffusers_trajectory import DiffusersTrajectory, diffusers_schedulers
from gpubench.trajectories import Pair, RuntimeTrajectory, TorchTrajectory
from tstitch_engines.backends import open_backend
from tstitch_engines.bundle.bundle import Bundle, open_bundle
from tstitch_engines.device.step_row import ROW
from tstitch_engines.errors import BadInput, OutOfProfile, unknown_name
from tstitch_trt.plan.plan import Plan, make_plan
from tstitch_trt.reference.torch_module import need_eager, torch_module
from tstitch_trt.request.init_image import noise_of
from tstitch_trt.study.machine import package_version

__all__ = ["Contender", "Work", "make_contender", "need_contenders"]

_SPACING: Final = "leading"  # the timesteps of diffusers' DDIM by default
_THEIRS: Final = ("torch-eager", "torch-compile", "diffusers")


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What all are to do. ``settings``: steps, solver and guidance. The images have the seeds ``seed``, ``seed + 1``...

    ``fractions``: the first member's shares of the steps; the last member takes the rest.
    """

    bundle: Bundle
    device: str
    threads: int
    batch: int
    seed: int
    fractions: tuple[float, ...]
    settings: Mapping[str, Any]
    scratch: Path

    @cached_property
    def plans(self) -> dict[float, Plan]:
        manifest = self.bundle.manifest
        return {f: make_plan(manifest, fraction=f, spacing=_SPACING, **self.settings) for f in self.fractions}

    @cached_property
    def noise(self) -> NDArray[np.float32]:
        """As this package draws it for these seeds, float32 ``[B,C,H,W]``."""
        latent = self.bundle.manifest.latent
        shape = (latent.channels, latent.height, latent.width)
        return noise_of(tuple(self.seed + i for i in range(self.batch)), shape)

    @cached_property
    def labels(self) -> list[int]:
        return [i % self.bundle.manifest.conditioning.classes for i in range(self.batch)]

    @cached_property
    def pair(self) -> Pair:
        """The members as PyTorch modules in float32, with the weights of their ONNX. Raises ``Unavailable``."""
        need_eager()
        manifest = self.bundle.manifest
        row = self.plans[self.fractions[0]].rows[0]
        return Pair(
            models={
                name: torch_module(name, member, [self.bundle.path(part) for part in member.onnx])
                .requires_grad_(False)
                .to(self.device)
                for name, member in manifest.members.items()
            },
            device=self.device,
            precision="fp32",
            channels=manifest.latent.channels,
            null=manifest.conditioning.null,
            guidance=float(row[ROW["G"]]) if self.plans[self.fractions[0]].guided[0] else 1.0,
            guided_channels=int(row[ROW["GUIDED_CHANNELS"]]),
        )

    @contextmanager
    def torch_threads(self) -> Iterator[None]:
        """PyTorch has one number of threads for the whole process: it is put back at the end."""
        need_eager()
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class Contender:
    """``walk`` leaves the final latents on the device and does not wait; ``latents`` brings them to the host.

    ``seconds``: what was spent on it before the first walk, by purpose.
    """

    def __init__(
        self,
        name: str,
        what: str,
        *,
        walk: Callable[[float], object],
        latents: Callable[[float], NDArray[np.float32]],
        seconds: dict[str, float],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.what = what
        self.walk = walk
        self.close = close
        self._latents = latents
        self._seconds = seconds
        self._first = 0.0

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours:")

    def first(self, fraction: float) -> NDArray[np.float32]:
        """The final latents of a walk that may compile what it needs, and is counted apart."""
        start = time.perf_counter()
        latents = self._latents(fraction)
        self._first += time.perf_counter() - start
        return latents

    def costs(self) -> dict[str, float]:
        return {**self._seconds, "first_walks_s": self._first}


def need_contenders(names: Sequence[str]) -> None:
    """Raises ``BadInput`` for a list of names that can't be compared."""
    for name in names:
        if not name.startswith("ours:") and name not in _THEIRS:
            raise unknown_name("contender", name, ("ours:onnxruntime", "ours:BACKEND+OPTION=VALUE", *_THEIRS))
    if len(set(names)) != len(names) or not any(name.startswith("ours:") for name in names):
        raise BadInput(
            f"--contenders {','.join(names)}: allowed are different ones, at least one of them ours:BACKEND",
            hint=f"e.g. --contenders ours:onnxruntime,{','.join(_THEIRS)}",
        )


def make_contender(name: str, work: Work) -> Contender:
    """Builds and loads what ``name`` needs; nothing is walked yet. Raises ``BadInput``, ``FailedWork``."""
    return _ours(name, work) if name.startswith("ours:") else _theirs(name, work)


def _theirs(name: str, work: Work) -> Contender:
    start = time.perf_counter()
    manifest, pair = work.bundle.manifest, work.pair
    trajectory: DiffusersTrajectory | TorchTrajectory
    torch_version = f"PyTorch {package_version('torch')}"
    if name == "diffusers":
        schedulers = diffusers_schedulers(manifest, solver=work.settings["solver"], spacing=_SPACING)
        trajectory = DiffusersTrajectory(pair, schedulers)
        kinds = {type(scheduler).__name__ for scheduler in schedulers.values()}
        what = f"diffusers {package_version('diffusers')}, {', '.join(kinds)}, modules in {torch_version} eager"
    else:
        trajectory = TorchTrajectory(pair, compiled=name == "torch-compile")
        mode = "default" if work.device == "cpu" else "max-autotune"
        what = f"{torch_version}, " + (f"torch.compile of whole steps, {mode}" if name == "torch-compile" else "eager")
    trajectory.prepare(work.noise, work.labels)
    return Contender(
        name,
        what,
        walk=lambda fraction: trajectory.walk(work.plans[fraction]),
        latents=lambda fraction: trajectory.walk(work.plans[fraction]).cpu().numpy(),
        seconds={"load_s": time.perf_counter() - start},
    )


def _ours(name: str, work: Work) -> Contender:
    backend, _, option = name.removeprefix("ours:").partition("+")
    bundle, build_s = _bundle_of(name, backend, option, work)
    on_cpu = work.device == "cpu"
    runtime = tstitch_trt.load(bundle, device=work.device, backend=backend, threads=work.threads if on_cpu else None)
    limit = runtime.batch_limit // (2 if any(plan.guided[0] for plan in work.plans.values()) else 1)
    if work.batch > limit:
        runtime.close()
        raise OutOfProfile(
            f"batch {work.batch} does not fit one engine call of {name}; allowed is 1 to {limit}",
            hint=f"pass --batch {limit}, or build the bundle with a larger --batch",
        )
    trajectory = RuntimeTrajectory(runtime, work.noise, work.labels, spacing=_SPACING, **work.settings)
    version = package_version({"torch": "torch", "onnxruntime": "onnxruntime"}.get(backend, backend))
    what = f"tstitch-trt {tstitch_trt.__version__}, backend {backend} {version}" + (f", {option}" if option else "")
    return Contender(
        name,
        what,
        walk=trajectory.walk,
        latents=trajectory.latents,
        seconds={"build_s": build_s, "load_s": runtime.load_ms / 1e3},
        close=runtime.close,
    )


def _bundle_of(name: str, backend: str, option: str, work: Work) -> tuple[Bundle, float]:
    """The bundle itself where it has such engines, else one that is built beside, and the seconds that took."""
    from tstitch_engines.compile.bundle import recompile
    from tstitch_export.build import build
    from tstitch_export.families.options import typed
    from tstitch_export.planning.recipe import recipe_names

    manifest = work.bundle.manifest
    built = all(any(e.identity.backend == backend for e in m.engines) for m in manifest.members.values())
    if built and not option:
        return work.bundle, 0.0
    library = open_backend(backend)
    key, _, value = option.partition("=")
    options = typed({key: value}, library.options, what=f"backend {backend!r}") if option else {}
    output = work.scratch / f"{manifest.name}-{name.removeprefix('ours:').replace('+', '-')}.bundle"
    output.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if library.model_kind == "onnx":
        recompile(work.bundle, backend=backend, device=work.device, options=options, output=output)
    elif manifest.recipe in recipe_names() and all(s.shipped for m in manifest.members.values() for s in m.sources):
        build(manifest.recipe, output=output, backend=backend, device=work.device, options=options)
    else:
        raise BadInput(
            f"{name} is not compiled from ONNX, and the bundle {manifest.name!r} was made from checkpoints that are "
            "not at hand; allowed are backends that compile ONNX",
            hint=f"leave {name} out of --contenders",
        )
    return open_bundle(output), time.perf_counter() - start
