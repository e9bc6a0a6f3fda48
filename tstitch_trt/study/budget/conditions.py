"""The conditions that a calibration is valid for, and the search for a valid one."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tstitch_engines.backends import BACKENDS, open_backend
from tstitch_engines.bundle.identity import digest
from tstitch_engines.compile.select import select_engine
from tstitch_engines.errors import NotCalibrated
from tstitch_trt.runtime.chooser import Setup
from tstitch_trt.study.machine import Machine, describe_machine
from tstitch_trt.study.records import Calibration
from tstitch_trt.study.store import load_studies, weights_of

if TYPE_CHECKING:
    from tstitch_engines.bundle.bundle import Bundle

__all__ = ["Conditions", "engine_digests", "find_calibration", "speed_of"]


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """``machine``: the facts that decide speed. ``threads``: 0 is all cores. ``graph``: the mode in use."""

    machine: dict[str, str]
    backend: str
    device: str
    threads: int
    graph: str

    @staticmethod
    def of(calibration: Calibration) -> Conditions:
        return Conditions._on(calibration.machine, calibration)

    @staticmethod
    def here(setup: Setup) -> Conditions:
        """Those of a runtime on this machine (``Runtime.setup``)."""
        return Conditions._on(describe_machine(), setup)

    @staticmethod
    def _on(machine: Machine, how: Calibration | Setup) -> Conditions:
        return Conditions(
            machine=speed_of(machine, how.backend, how.device),
            backend=how.backend,
            device=how.device,
            threads=how.threads,
            graph=how.graph,
        )

    @property
    def key(self) -> str:
        """The name of the calibration's file."""
        return digest(self)[:16]

    def differences(self, other: Conditions) -> list[tuple[str, str, str]]:
        """The fields that are not the same: name, the value here, that of ``other``."""
        before, now = self._flat(), other._flat()
        return [
            (name, before.get(name, "none"), now.get(name, "none"))
            for name in dict.fromkeys((*before, *now))
            if before.get(name) != now.get(name)
        ]

    def _flat(self) -> dict[str, str]:
        threads = str(self.threads or "all cores")
        own = {"backend": self.backend, "device": self.device, "threads": threads, "graph": self.graph}
        return {**self.machine, **own}

    def command(self, bundle: str | Path) -> str:
        """The command that calibrates ``bundle`` under these conditions."""
        words = [f"tstitch-trt calibrate {shlex.quote(str(bundle))} --backend {self.backend}"]
        if self.device != "cpu":
            words += [f"--device {self.device}"] + ([] if self.graph == "step" else [f"--graph {self.graph}"])
        return " ".join([*words, *([f"--threads {self.threads}"] if self.threads else [])])


def speed_of(machine: Machine, backend: str, device: str) -> dict[str, str]:
    """The facts that decide how fast engines of ``backend`` run on ``device``: not load, memory or Python."""
    found = {"processor": machine.processor, "cores": str(machine.cores)}
    if device != "cpu":
        found["gpus and driver"] = "; ".join(machine.gpus) or "none"
    packages = BACKENDS[backend].packages if backend in BACKENDS else ()
    return {**found, **{name: machine.versions[name] for name in packages if name in machine.versions}}


def engine_digests(bundle: Bundle, backend: str, device: str) -> dict[str, str]:
    """By member the identity digest of the engine that would load there. Raises ``BadEngine`` where none fits."""
    library = open_backend(backend)
    return {name: digest(select_engine(bundle, name, library, device).identity) for name in bundle.manifest.members}


def find_calibration(bundle: Bundle, here: Conditions) -> Calibration:
    """The calibration of ``bundle`` that holds under the conditions ``here``.

    Raises ``NotCalibrated`` where there is none: naming each field in which the nearest one differs (machine, library
    version, backend, device, threads, graph), or the members whose engine or weights are others by now. A calibration
    of other conditions is never used.
    """
    known = load_studies(bundle, Calibration)
    hint = f"run: {here.command(bundle.root)}"
    if not known:
        raise NotCalibrated(
            f"the bundle {bundle.root} has no calibration: what its members cost on this machine is not known",
            hint=hint,
        )
    found = next((study for study in known if Conditions.of(study) == here), None)
    if found is None:
        near = min(known, key=lambda study: len(Conditions.of(study).differences(here)))
        lines = "; ".join(
            f"{name} was {there} and is {now} here" for name, there, now in Conditions.of(near).differences(here)
        )
        others = f" ({len(known) - 1} more differ as well)" if len(known) > 1 else ""
        raise NotCalibrated(
            f"the bundle {bundle.root} has no calibration that holds here; in the nearest, of {near.made}, "
            f"{lines}{others}",
            hint=hint,
        )
    stale = _stale(found, "the weights", found.weights, weights_of(bundle.manifest))
    if not stale:  # an engine is of its weights: one reason is enough
        stale = _stale(found, "the engine", found.engines, engine_digests(bundle, here.backend, here.device))
    if stale:
        raise NotCalibrated(f"the calibration of {found.made} in {bundle.root} is stale: {'; '.join(stale)}", hint=hint)
    return found


def _stale(study: Calibration, what: str, stored: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [
        f"{what} of member {name!r} was {stored.get(name, 'nothing')[:12]} and is {now.get(name, 'nothing')[:12]} now"
        for name in dict.fromkeys((*stored, *now))
        if stored.get(name) != now.get(name)
    ]
