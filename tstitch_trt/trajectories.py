"""What one member is given while a bundle samples: its real inputs, recorded over whole trajectories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.backends import open_backend
from tstitch_engines.backends.base import Engine
from tstitch_engines.bundle import Bundle
from tstitch_engines.device import Device, open_device
from tstitch_engines.errors import BadInput
from tstitch_engines.manifest import SCHEMA, EngineIdentity, Manifest, Member
from tstitch_engines.spec import Range, ShapeProfile
from tstitch_trt.caller import Arrays, Caller
from tstitch_trt.recorder import Recorder, needs_widening, widen_graph, widened
from tstitch_trt.runtime import Runtime

__all__ = ["Trajectories", "group_levels", "pick_rows"]

_BATCH: Final = 16  # rows per engine call: half as many images where guidance is on

Rows = dict[str, NDArray[Any]]  # inputs by name, one row per image and half


class Trajectories:
    """All members of a bundle on ONNX Runtime's CPU provider, compiled from the bundle's ONNX into ``folder``."""

    def __init__(
        self, bundle: Bundle, *, settings: dict[str, Any], folder: Path, threads: int, tick: Callable[[], None]
    ) -> None:
        """``settings``: keywords of ``make_plan`` that all trajectories share. ``tick`` is called after every step."""
        self._bundle = bundle
        self._settings = settings
        self._folder = folder
        self._threads = threads
        self._tick = tick
        self._device: Device = open_device("cpu")
        self._engines: dict[str, Engine] = {}
        members: dict[str, Member] = {}
        try:
            for name, member in bundle.manifest.members.items():
                model, members[name] = bundle.path(member.onnx[0]), member
                if needs_widening(member):
                    model, members[name] = widen_graph(model, folder / f"{name}-wide.onnx"), widened(member)
                self._engines[name] = self.compiled(f"{name}-source", model, members[name])
        except BaseException:
            self.close()
            raise
        self._manifest: Manifest = msgspec.structs.replace(bundle.manifest, members=members)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines = {}

    def compiled(self, tag: str, model: Path, member: Member) -> Engine:
        """``model`` as an engine of ONNX Runtime."""
        backend = open_backend("onnxruntime")
        profile = ShapeProfile({"B": Range(1, _BATCH, _BATCH)})
        identity = EngineIdentity(
            schema=SCHEMA,
            backend=backend.name,
            backend_version=backend.version(),
            onnx_sha256="",
            precision=member.precision,
            profile=profile,
            arch=backend.arch("cpu"),
        )
        made = backend.compile(
            member=member,
            model=model,
            profile=profile,
            device="cpu",
            options={},
            output=self._folder / f"{tag}{backend.engine_suffix}",
            progress=lambda phase, share: None,
        )
        return backend.load(made[0], member=member, identity=identity, device=self._device, threads=self._threads)

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
        """In how many parts so many guided images are sampled."""
        return -(-images // (_BATCH // 2))

    def outputs(self, engine: Engine | str, rows: Rows) -> NDArray[np.float32]:
        """What an engine, or the source engine of a member, makes of ``rows``."""
        used = self._engines[engine] if isinstance(engine, str) else engine
        caller = Caller(used, self._device)
        count = len(next(iter(rows.values())))
        parts = []
        for start in range(0, count, _BATCH):
            parts.append(caller({key: values[start : start + _BATCH] for key, values in rows.items()}))
            self._tick()
        return np.concatenate([part[used.outputs[0].name] for part in parts])

    def _sample(self, runtime: Runtime, schedule: str, seeds: Sequence[int]) -> Any:
        classes = self._manifest.conditioning.classes
        return runtime.sample(
            labels=[seed % classes for seed in seeds],
            seeds=list(seeds),
            schedule=schedule,
            decode=False,
            callback=lambda event: self._tick() or True,
            **self._settings,
        )

    def _runtime(self, other: dict[str, Engine], manifest: Manifest | None = None) -> Runtime:
        """On engines that outlive it: it is not closed, its buffers go with it."""
        bundle = Bundle(self._bundle.root, manifest or self._manifest)
        return Runtime(bundle, self._device, "onnxruntime", {**self._engines, **other}, 0.0)


def pick_rows(timesteps: NDArray[np.float32], count: int, *, seed: int) -> NDArray[np.int64]:
    """``count`` row numbers, as equal a share as possible of every noise level that is among ``timesteps [R]``.

    With fewer than there are levels, levels in equal distances, the noisiest and the cleanest among them; never more
    than there are rows. In the order of the rows. The same for the same ``seed``.
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
