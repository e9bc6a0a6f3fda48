"""What is measured: pictures compared, requests alone, and windows of load; each kept on disk once it is done."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from servingbench.asks import Arrivals, Ask, Kind, Mix, TraceRow, make_asks
from servingbench.client import Answer, Client
from servingbench.figures import Counters, Limit, Served, latencies, percentile, strain, within
from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.errors import FailedWork
from tstitch_trt.files import atomic_file, write_text
from tstitch_trt.progress import log

__all__ = ["TOLERANCE", "Comparison", "Load", "Measurement", "Window", "figures"]

# Pictures show the same work where no pixel differs by more than this many of its 255 levels. Rounding to levels turns
# the rounding of float32 latents, 1e-7 to 3e-4 relative, into one level here and there. Other work, such as the wrong
# class or timestep, differs by tens of levels.
TOLERANCE: Final = 2

_TIMES_ALONE: Final = 3  # that every kind of request is sent alone; the least counts
_DRAWS: Final = 4096  # of a mix, for its mean
_GIVEN_UP: Final = 0.5  # a contender that meets no limit with this share of requests is not asked for more

Pictures = NDArray[np.uint8]
T = TypeVar("T")


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """``alone``: kinds of requests and the seconds of each on the idle server of the first contender.

    ``differences``: contender -> the largest difference of its pictures from those of the first, in levels.
    """

    alone: tuple[tuple[Kind, float], ...]
    differences: dict[str, int]


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """``share`` of what one request at a time can do: ``rate`` requests a second."""

    mix: str
    share: float
    rate: float


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """What a contender did under a load. ``seconds``: from the first arrival to the last answer."""

    served: tuple[Served, ...]
    seconds: float
    counters: Counters
    cpu_seconds: float
    peak_bytes: int
    difference: int
    machine_load: float


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """``client``: the front of a contender, started when it is first needed. ``limit``: what requests are told."""

    manifest: Manifest
    names: Sequence[str]
    mixes: Mapping[str, Mix]
    arrivals: Arrivals
    trace: Sequence[TraceRow]
    seconds: float
    seed: int
    limits: Sequence[Limit]
    folder: Path
    client: Callable[[str], Client]

    def kinds(self) -> list[Kind]:
        """All kinds of requests that may be sent."""
        recorded = {row.kind for row in self.trace if row.kind is not None}
        free = [] if recorded and all(row.kind is not None for row in self.trace) else list(self.mixes.values())
        return sorted(recorded | {kind for mix in free for kind in mix.kinds()}, key=str)

    # --- before the clock runs

    def compare(self) -> Comparison:
        """One request of every kind to all: alone to the first contender, all at once to the others, whose batches are
        then as mixed as they can be. Raises ``FailedWork`` for pictures that differ."""
        path = self.folder / "compared.json"
        known = _read(path, Comparison) if path.is_file() else Comparison(alone=(), differences={})
        kinds = self.kinds()
        asks = [self._ask(kind, index) for index, kind in enumerate(kinds)]
        alone, differences = dict(known.alone), dict(known.differences)
        want: list[Pictures] | None = None
        for name in self.names:
            if name in differences and all(kind in alone for kind in kinds):
                continue
            if want is None:
                with self.client(self.names[0]).running() as first:
                    log(f"comparing with the pictures of {first.name}: {len(kinds)} kinds of requests")
                    repeated = [[_sound(first.send([ask])[0], first) for _ in range(_TIMES_ALONE)] for ask in asks]
                want = [_pictures(answers[0]) for answers in repeated]
                found = zip(kinds, repeated, strict=True)
                alone = {kind: min(answer.latency for answer in answers) for kind, answers in found} | alone
                differences[first.name] = 0
            if name != self.names[0]:
                with self.client(name).running() as client:
                    answers = [_sound(answer, client) for answer in client.send(asks)]
                differences[name] = max(
                    check(name, self.names[0], str(kind), _pictures(answer), reference)
                    for kind, answer, reference in zip(kinds, answers, want, strict=True)
                )
            done = Comparison(alone=tuple(alone.items()), differences=differences)
            write_text(path, msgspec.json.encode(done).decode())
        return Comparison(alone=tuple(alone.items()), differences=differences)

    def _ask(self, kind: Kind, index: int) -> Ask:
        labels = tuple((index + i) % self.manifest.conditioning.classes for i in range(kind.images))
        return Ask(at=0.0, kind=kind, labels=labels, seed=1000 * index)

    def capacity(self, mix: str, alone: Mapping[Kind, float]) -> float:
        """Requests a second that one at a time can do: the inverse of their mean time alone."""
        rng = random.Random(0)  # noqa: S311 - requests, not secrets
        recorded = [row.kind for row in self.trace if row.kind is not None]
        kinds = recorded or [self.mixes[mix].draw(rng) for _ in range(_DRAWS)]
        return len(kinds) / sum(alone[kind] for kind in kinds)

    # --- under load

    def asks(self, load: Load, alone: Mapping[Kind, float]) -> list[Ask]:
        """The same for all contenders; each is told its limit."""
        drawn = make_asks(
            self.manifest,
            self.mixes[load.mix],
            arrivals=self.arrivals,
            rate=load.rate,
            seconds=self.seconds,
            seed=f"{self.seed} {load.mix} {load.share:g}",
            trace=self.trace,
        )
        return [msgspec.structs.replace(ask, limit=self.limits[0].of(alone[ask.kind])) for ask in drawn]

    def window(self, load: Load, name: str, asks: Sequence[Ask], alone: Mapping[Kind, float]) -> Window:
        """Kept or measured now."""
        path = self.path(load, name)
        if path.is_file():
            return _read(path, Window)
        machine_load = os.getloadavg()[0]
        with self.client(name).running() as client:
            before, counted = client.usage(), client.counters
            answers = client.send(asks)
            after = client.usage()
            counters = client.counters.since(counted)
        difference = self._compared(load, name, answers)
        served = tuple(
            Served(
                at=ask.at,
                images=ask.kind.images,
                alone=alone[ask.kind],
                latency=answer.latency if answer.error is None else None,
                error=answer.error,
            )
            for ask, answer in zip(asks, answers, strict=True)
        )
        ends = [ask.at + answer.latency for ask, answer in zip(asks, answers, strict=True)]
        window = Window(
            served=served,
            seconds=max(ends) - asks[0].at,
            counters=counters,
            cpu_seconds=after.cpu_seconds - before.cpu_seconds,
            peak_bytes=after.peak_bytes,
            difference=difference,
            machine_load=machine_load,
        )
        write_text(path, msgspec.json.encode(window).decode())
        return window

    def path(self, load: Load, name: str) -> Path:
        return self.folder / f"{load.mix}-{load.share:g}-{name}.json"

    def _compared(self, load: Load, name: str, answers: Sequence[Answer]) -> int:
        """The largest difference from the pictures that the first contender gave under the same load."""
        path = self.path(load, self.names[0]).with_suffix(".npz")
        drawn = {str(i): answer.pictures for i, answer in enumerate(answers) if answer.pictures is not None}
        if name == self.names[0]:
            with atomic_file(path) as file:
                np.savez(file, allow_pickle=False, **drawn)
            return 0
        with np.load(path) as wanted:
            both = [index for index in drawn if index in wanted]
            where = f"request {{}} of {load.mix} at load {load.share:g}"
            return max((check(name, self.names[0], where.format(i), drawn[i], wanted[i]) for i in both), default=0)

    def given_up(self, window: Window) -> bool:
        """Whether more load would tell nothing."""
        return max(within(window.served, limit) for limit in self.limits) < _GIVEN_UP


def check(name: str, reference: str, where: str, got: Pictures, want: Pictures) -> int:
    """The largest difference in levels. Raises ``FailedWork`` where it is more than ``TOLERANCE``."""
    same = got.shape == want.shape
    difference = int(np.abs(got.astype(np.int16) - want.astype(np.int16)).max()) if same else 255
    if difference > TOLERANCE:
        raise FailedWork(
            f"{name} draws other pictures than {reference}, {where}: a pixel differs by {difference} levels; allowed "
            f"are {TOLERANCE}, else the times compare different work",
            hint=f"leave {name} out of --contenders",
        )
    return difference


def figures(window: Window, limits: Sequence[Limit], seconds: float) -> dict[str, Any]:
    """A window as numbers; what is infinite is ``None``. ``seconds``: of its arrivals."""
    times = latencies(window.served)
    done = [one for one in window.served if one.latency is not None]
    images = sum(one.images for one in done)
    counters = window.counters
    return {
        "answered": len(done),
        "errors": dict(Counter(one.error for one in window.served if one.error is not None)),
        "requests_per_second": len(done) / window.seconds,
        "images_per_second": images / window.seconds,
        **{f"p{share}_ms": _finite(1e3 * percentile(times, share / 100)) for share in (50, 95, 99)},
        "within": {str(limit): within(window.served, limit) for limit in limits},
        "goodput": {str(limit): within(window.served, limit) * len(window.served) / seconds for limit in limits},
        "strain": {str(limit): _finite(strain(window.served, limit)) for limit in limits},
        "lanes_per_call": counters.lanes / counters.calls if counters.calls else None,
        **_overhead(counters),
        "cpu_seconds": window.cpu_seconds,
        "cpu_ms_per_image": 1e3 * window.cpu_seconds / images if images else None,
        "peak_bytes": window.peak_bytes,
        "largest_difference": window.difference,
        "machine_load": window.machine_load,
    }


def _overhead(counters: Counters) -> dict[str, float]:
    """Of the engine, which counts it."""
    if not counters.large_calls:
        return {}
    overhead, large = counters.overhead / counters.calls, counters.large_seconds / counters.large_calls
    return {"overhead_ms": 1e3 * overhead, "large_step_ms": 1e3 * large, "overhead_share": overhead / large}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _read(path: Path, kind: type[T]) -> T:
    return msgspec.json.decode(path.read_bytes(), type=kind)


def _sound(answer: Answer, client: Client) -> Answer:
    if answer.error is not None:
        raise FailedWork(f"{client.name} does not answer: {answer.error}", hint=f"read {client.log}")
    return answer


def _pictures(answer: Answer) -> Pictures:
    assert answer.pictures is not None, "a sound answer has pictures"
    return answer.pictures
