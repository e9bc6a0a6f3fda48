"""Who asks for what, and when: arrivals, mixes of requests and recorded traces, all fixed by a seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.bundle.read import read_bounded
from tstitch_engines.errors import BadInput
from tstitch_trt.files import write_text

__all__ = ["MIXES", "Arrivals", "Ask", "Kind", "Mix", "arrival_times", "make_asks", "read_trace", "write_trace"]

SPACING: Final = "leading"  # the timesteps of diffusers' DDIM by default
TRACE_BYTES: Final = 256 << 20
_LONGEST: Final = 10_000_000  # requests
_BURST: Final = 8  # requests of a burst on average
_BURST_SECONDS: Final = 0.05  # over which one is spread

Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Steps = Annotated[int, msgspec.Meta(ge=1, le=1000)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Scale = Annotated[float, msgspec.Meta(ge=0, le=100)]
Images = Annotated[int, msgspec.Meta(ge=1, le=64)]
Side = Annotated[int, msgspec.Meta(ge=1, le=8192)]
Arrivals = Literal["poisson", "burst", "trace"]


class Kind(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides how long a request takes. ``size``: height and width in pixels, ``None`` for the bundle's own."""

    steps: Steps
    fraction: Share
    solver: str = "ddim"
    guidance: Scale = 1.0
    images: Images = 1
    size: tuple[Side, Side] | None = None

    def __str__(self) -> str:
        size = "" if self.size is None else f", {self.size[0]}x{self.size[1]}"
        return (
            f"{self.images} images, {self.steps} {self.solver} steps, fraction {self.fraction:g}, "
            f"guidance {self.guidance:g}{size}"
        )

    @property
    def plan(self) -> Kind:
        """The kind of one image: requests with equal ones may share one call of ``Runtime.sample``."""
        return msgspec.structs.replace(self, images=1)

    def keywords(self) -> dict[str, Any]:
        """Of ``Runtime.sample`` and ``Engine.submit``: the plan and the size."""
        found: dict[str, Any] = {name: getattr(self, name) for name in ("steps", "fraction", "solver", "guidance")}
        if self.size is not None:
            found["height"], found["width"] = self.size
        return {**found, "spacing": SPACING}


class Ask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request. ``at``: seconds after the start. Image i has the class ``labels[i]`` and the seed ``seed + i``.

    ``limit``: seconds within which it is to be answered, where the server is told.
    """

    at: Seconds
    kind: Kind
    labels: tuple[int, ...]
    seed: int
    limit: float | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.seed + i for i in range(self.kind.images))


class Mix(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What requests are drawn from, each value as often as it is in its list."""

    steps: tuple[Steps, ...]
    fractions: tuple[Share, ...]
    solvers: tuple[str, ...] = ("ddim",)
    guidances: tuple[Scale, ...] = (1.0,)
    images: tuple[Images, ...] = (1,)
    sizes: tuple[tuple[Side, Side] | None, ...] = (None,)

    def kinds(self) -> set[Kind]:
        """All that it may draw."""
        sizes = itertools.product(self.solvers, self.guidances, self.images, self.sizes)
        return {
            Kind(steps=steps, fraction=fraction, solver=solver, guidance=guidance, images=images, size=size)
            for steps, fraction, (solver, guidance, images, size) in itertools.product(
                self.steps, self.fractions, list(sizes)
            )
        }

    def draw(self, rng: random.Random) -> Kind:
        return Kind(
            steps=rng.choice(self.steps),
            fraction=rng.choice(self.fractions),
            solver=rng.choice(self.solvers),
            guidance=rng.choice(self.guidances),
            images=rng.choice(self.images),
            size=rng.choice(self.sizes),
        )


MIXES: Final = {
    "mixed": Mix(
        steps=(10, 20, 30, 50), fractions=(0.0, 0.4, 0.7), guidances=(1.0, 1.0, 1.0, 1.5), images=(1, 1, 1, 2)
    ),
    "uniform": Mix(steps=(20,), fractions=(0.4,)),
}


def arrival_times(arrivals: Arrivals, rate: float, seconds: float, rng: random.Random) -> list[float]:
    """Times in ``[0, seconds)`` of a mean of ``rate`` a second.

    ``poisson``: gaps are exponential. ``burst``: groups of one to fifteen whose starts are a Poisson process, each
    spread over 50 ms. A trace has its own times (``make_asks``).
    """
    found: list[float] = []
    at = 0.0
    if arrivals == "poisson":
        while (at := at + rng.expovariate(rate)) < seconds:
            found.append(at)
    else:
        while (at := at + rng.expovariate(rate / _BURST)) < seconds:
            found += [at + rng.uniform(0, _BURST_SECONDS) for _ in range(rng.randint(1, 2 * _BURST - 1))]
    return sorted(time for time in found if time < seconds)


def make_asks(
    manifest: Manifest,
    mix: Mix,
    *,
    arrivals: Arrivals,
    rate: float,
    seconds: float,
    seed: str,
    trace: Sequence[TraceRow] = (),
) -> list[Ask]:
    """The requests of one window: equal for equal arguments. ``trace``: its times, in place of drawn ones, are
    stretched to ``rate``; what a row leaves out is drawn from the mix."""
    rng = random.Random(seed)  # noqa: S311 - requests, not secrets
    if arrivals == "trace":
        scale = len(trace) / rate / max(trace[-1].at, 1e-9)
        rows = [(row.at * scale, row.kind) for row in trace if row.at * scale < seconds]
    else:
        rows = [(at, None) for at in arrival_times(arrivals, rate, seconds, rng)]
    classes = manifest.conditioning.classes
    found = []
    for at, given in rows:
        kind = mix.draw(rng) if given is None else given
        labels = tuple(rng.randrange(classes) for _ in range(kind.images))
        found.append(Ask(at=at, kind=kind, labels=labels, seed=rng.randrange(1 << 31)))
    return found


class TraceRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line of a trace. ``at``: seconds after its start. Without ``kind`` only the time was recorded."""

    at: Seconds
    kind: Kind | None = None


def read_trace(path: Path) -> list[TraceRow]:
    """A file with one JSON object a line, ``{"at": 0.25, "kind": {"steps": 20, "fraction": 0.4}}``, in order of time.

    Raises ``BadInput``.
    """
    allowed = 'a line is {"at": SECONDS} or {"at": SECONDS, "kind": {"steps": 20, "fraction": 0.4}}'
    try:
        rows = msgspec.json.Decoder(TraceRow).decode_lines(read_bounded(path, TRACE_BYTES))
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise BadInput(f"the trace {path} can't be read: {error}; {allowed}", hint="write one with --record") from None
    if not 1 <= len(rows) <= _LONGEST or any(a.at > b.at for a, b in itertools.pairwise(rows)):
        raise BadInput(
            f"the trace {path} has {len(rows)} lines; allowed are 1 to {_LONGEST:,}, in order of time",
            hint="sort it by at",
        )
    return rows


def write_trace(path: Path, asks: Sequence[Ask]) -> None:
    rows = [TraceRow(at=round(ask.at, 6), kind=ask.kind) for ask in asks]
    write_text(path, msgspec.json.Encoder().encode_lines(rows).decode())
