"""Whole trajectories of a bundle, with the inputs of one member recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.backends import open_backend
from tstitch_engines.backends.base import Engine
from tstitch_engines.bundle.bundle import Bundle
from tstitch_engines.bundle.manifest import Manifest, Member, Network
from tstitch_engines.child import DEFAULT, Limits
from tstitch_engines.compile.load import load_own
from tstitch_engines.device.base import Device
from tstitch_engines.device.open import open_device
from tstitch_engines.errors import BadInput, Unavailable
from tstitch_engines.host_call import Arrays, HostRunner
from tstitch_engines.progress import silent
from tstitch_engines.spec import Range
from tstitch_trt.plan.options import PlanOptions
from tstitch_trt.reference.recorder import (
    AnyNetwork,
    Recorder,
    cpu_identity,
    needs_widening,
    own_files,
    widen_graph,
    widened,
)
from tstitch_trt.runtime.runtime import Runtime
from tstitch_trt.study.image_set import image_keywords

__all__ = ["Trajectories", "group_levels", "needed_parts", "pick_rows"]

_TOKENS: Final = Range(1, 77, 1 << 12)
_BATCH: Final = 16  # rows per engine call: half as many images where guidance is on

Rows = dict[str, NDArray[Any]]  # inputs by name, one row per image and half


class Trajectories:
    """Members of a bundle, with the encoders that they need, compiled for ONNX Runtime's CPU provider in ``folder``."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        options: PlanOptions,
        folder: Path,
        threads: int,
        tick: Callable[[], None],
        names: Iterable[str] | None = None,
        prompts: Sequence[str] = (),
        limits: Limits = DEFAULT,
    ) -> None:
        """``options``: shared by all trajectories, without a schedule. ``tick`` is called after every step.

        ``names``: the members that run, by default all. ``prompts``: of a text bundle; image ``seed`` is of prompt
        ``seed % len(prompts)``. ``limits``: of compiling a graph.
        """
        self._bundle = bundle
        self._prompts = tuple(prompts)
        self._options = options
        self._folder = folder
        self._threads = threads
        self._limits = limits
        self._tick = tick
        self._device: Device = open_device("cpu")
        self._engines: dict[str, Engine] = {}
        manifest = bundle.manifest
        self._names = tuple(manifest.members if names is None else names)
        members, parts = dict(manifest.members), dict(manifest.parts)
        try:
            for name in self._names:
                members[name] = self._compile(name, members[name])
            for name in needed_parts(manifest, self._names):
                parts[name] = self._compile(name, parts[name])
        except BaseException:
            self.close()
            raise
        self._manifest: Manifest = msgspec.structs.replace(manifest, members=members, parts=parts)

    def _compile(self, name: str, network: AnyNetwork) -> AnyNetwork:
        """Makes its engine and returns the network, widened where that was necessary."""
        model, made = self._bundle.path(network.onnx[0]), network
        if needs_widening(network):
            model, network = widen_graph(model, self._folder / f"{name}-wide.onnx"), widened(network)
            made = msgspec.structs.replace(network, onnx=own_files(model))
        self._engines[name] = self.compiled(f"{name}-source", model, made)
        return network

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines = {}

    def compiled(self, tag: str, model: Path, member: Network) -> Engine:
        """``model`` as an engine of ONNX Runtime, for the bundle's own size. ``member.onnx`` lists its files."""
        backend = open_backend("onnxruntime")
        latent = self._bundle.manifest.latent
        ranges = {"B": Range(1, _BATCH, _BATCH), "T": _TOKENS}
        ranges |= {side: Range(size, size, size) for side, size in (("H", latent.height), ("W", latent.width))}
        profile = member.profile_of(ranges)
        identity = cpu_identity(backend, member, profile)
        made = backend.compile(
            member=member,
            model=model,
            profile=profile,
            device="cpu",
            options={},
            output=self._folder / f"{tag}{backend.engine_suffix}",
            progress=silent,
            limits=self._limits,
        )
        return load_own(backend, made, member, identity, self._device, threads=self._threads)

    def record(self, name: str, schedule: str, seeds: Sequence[int]) -> Rows:
        """The inputs of every call of the member ``name``, both halves of guidance, while these seeds are sampled."""
        calls: list[Arrays] = []
        recorder = Recorder(self._engines[name], self._device, calls)
        self._sample(self._runtime({name: recorder}), schedule, seeds)
        return {spec.name: np.concatenate([call[spec.name] for call in calls]) for spec in self._engines[name].inputs}

    def latents(
        self, schedule: str, seeds: Sequence[int], other: dict[str, tuple[Member, Engine]]
    ) -> NDArray[np.float32]:
        """The final latents ``[N,C,H,W]``, with the engines ``other`` in place of the members' own."""
        members = {**self._manifest.members, **{name: member for name, (member, _) in other.items()}}
        manifest = msgspec.structs.replace(self._manifest, members=members)
        runtime = self._runtime({name: engine for name, (_, engine) in other.items()}, manifest)
        found: NDArray[np.float32] = self._sample(runtime, schedule, seeds).latents
        return found

    def chunks(self, images: int) -> int:
        """The number of parts in which guided images are sampled."""
        return -(-images // (_BATCH // 2))

    def outputs(self, engine: Engine | str, rows: Rows) -> NDArray[np.float32]:
        """The outputs ``[R,...]`` for ``rows`` of an engine, or of the source engine of a member."""
        used = self._engines[engine] if isinstance(engine, str) else engine
        runner = HostRunner(used, self._device)
        count = len(next(iter(rows.values())))
        parts = []
        for start in range(0, count, _BATCH):
            parts.append(runner({key: values[start : start + _BATCH] for key, values in rows.items()}))
            self._tick()
        return np.concatenate([part[used.outputs[0].name] for part in parts])

    def _sample(self, runtime: Runtime, schedule: str, seeds: Sequence[int]) -> Any:
        return runtime.sample(
            **image_keywords(self._manifest, seeds, self._prompts, self._names, pictures=len(seeds)),
            seeds=list(seeds),
            decode=False,
            callback=lambda event: self._tick(),
            **replace(self._options, schedule=schedule).explicit(),
        )

    def _runtime(self, other: dict[str, Engine], manifest: Manifest | None = None) -> Runtime:
        """A runtime on engines that outlive it, so it is not closed."""
        bundle = Bundle(self._bundle.root, manifest or self._manifest)
        return Runtime(bundle, self._device, "onnxruntime", {**self._engines, **other}, 0.0)


def needed_parts(manifest: Manifest, names: Iterable[str]) -> list[str]:
    """The parts that the members ``names`` need to sample from prompts. Raises ``Unavailable`` for a missing one."""
    needed: dict[str, str] = {}
    for member in (manifest.members[name] for name in names):
        if member.text is not None:
            needed |= dict.fromkeys(member.text.encoders if member.text.hidden else ["text encoder"], "read prompts")
        if member.inpaints:
            needed["vae_encoder"] = "take a picture to paint into"
    for part, purpose in needed.items():
        if part not in manifest.parts:
            raise Unavailable(
                f"the bundle {manifest.name!r} has no {part}, so it can't {purpose}; trajectories to calibrate on "
                "start there",
                hint="build it from a whole pipeline folder and quantise that",
            )
    return [part for part in manifest.parts if part in needed]


def pick_rows(timesteps: NDArray[np.float32], count: int, *, seed: int) -> NDArray[np.int64]:
    """``count`` row numbers, rising, of every noise level in ``timesteps [R]`` as equally many as possible.

    With fewer than there are levels, of levels in equal distances, the noisiest and the cleanest included; never more
    than there are rows. The same for the same ``seed``. Raises ``BadInput``.
    """
    if count < 1:
        raise BadInput(f"rows to pick = {count}; allowed is 1 or more", hint="e.g. --samples 256")
    rng = np.random.default_rng(seed)
    levels = np.unique(timesteps)
    if count < len(levels):
        levels = levels[np.unique(np.linspace(0, len(levels) - 1, count).round().astype(int))]
    waiting = [list(rng.permutation(np.flatnonzero(timesteps == level))) for level in levels]
    found: list[int] = []
    while len(found) < count and any(waiting):
        # One of each level in turn; the last, incomplete round goes to levels in equal distances.
        turn = [rows for rows in waiting if rows]
        missing = count - len(found)
        if missing < len(turn):
            turn = [turn[i] for i in np.linspace(0, len(turn) - 1, missing).round().astype(int)]
        found += [rows.pop() for rows in turn]
    return np.sort(np.array(found, np.int64))


def group_levels(timesteps: NDArray[np.float32], groups: int) -> list[NDArray[np.int64]]:
    """The row numbers of at most ``groups`` runs of neighbouring noise levels, the noisiest first."""
    levels = np.unique(timesteps)[::-1]
    return [np.flatnonzero(np.isin(timesteps, part)) for part in np.array_split(levels, min(groups, len(levels)))]
