"""Many threads on one runtime for a long time: no wrong picture, and no more memory, files or threads at the end.

    python benchmarks/soak.py --minutes 10                    # the built-in pair, built into build/fashion.bundle
    python benchmarks/soak.py my.bundle --seconds 60 --threads 8

Every thread calls one verb after another, drawn from the seed: it samples, iterates, decodes, encodes, measures,
cancels, raises from its callback, drops iterators, reads stale events and asks for images that become NaN. One of them
closes the runtime now and then, while the others are in it, and loads another. What comes back is compared by hash with
the same call alone. It stops at what is wrong. Writes ``soak.json``, and exits with 1 where anything was.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import random
import statistics
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from gpubench.script import parser_of, run_script, write_record
from numpy.typing import NDArray

import tstitch_trt
from tstitch_engines.bundle.manifest import ComponentName, Manifest
from tstitch_engines.errors import BadInput, Busy, Cancelled, Closed, NotFinite, TStitchError
from tstitch_trt import Runtime, StepEvent
from tstitch_trt.progress import log, progress_bar
from tstitch_trt.study.machine import describe_machine

WORDS: Final = ("a", "red", "blue", "fox", "bear", "sky", "sea", "blurry")
HUGE: Final = 3e38  # latents that float32 holds, and no step of them
MEMORY: Final = 24 << 20  # bytes that the allocator may keep more at the end
MOST_SHOWN: Final = 20


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", help="default: the built-in pair")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, help="in place of --minutes")
    parser.add_argument("--threads", type=int, default=8, help="that call (default 8); engines have one each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", help="default: the first that the bundle was built for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soak.json")
    args = parser.parse_args(argv)
    return run_script(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    seconds = 60 * args.minutes if args.seconds is None else args.seconds
    if not 0 < seconds < 1e6 or not 1 <= args.threads <= 256:
        raise BadInput(
            f"{seconds:g} seconds, {args.threads} threads; allowed are more than 0 seconds and 1 to 256 threads",
            hint="e.g. --minutes 10 --threads 8",
        )
    load: dict[str, Any] = {"device": args.device, "backend": args.backend, "verify": "size"}
    if args.device == "cpu":
        load["threads"] = 1
    done = Soak(args.bundle or built_in(), load, args.threads, args.seed).run(seconds)
    return told(
        args, {"command": "python benchmarks/soak.py " + " ".join(sys.argv[1:]), **done},
        f"{done['calls']} calls of {args.threads} threads in {done['seconds']:.0f} s, {done['reloads']} reloads",
    )  # fmt: skip


def told(args: argparse.Namespace, done: Mapping[str, Any], words: str) -> int:
    """Writes what was found, and shows its violations and ``words``. Returns the exit code."""
    machine = msgspec.to_builtins(describe_machine())
    write_record(args.out, {"device": args.device, "seed": args.seed, "machine": machine, **done})
    log(f"written: {args.out}")
    for line in done["violations"][:MOST_SHOWN]:
        log(f"violation: {line}")
    print(f"{words}, {len(done['violations'])} violations")
    return 1 if done["violations"] else 0


def built_in() -> Path:
    path = Path("build/fashion.bundle")
    if not path.is_dir():
        from tstitch_export.build import build

        path.parent.mkdir(exist_ok=True)
        build("fashion", output=path)
    return path


# --- what is called


def digest(*arrays: NDArray[Any] | None) -> str:
    found = hashlib.blake2b(digest_size=16)
    for array in arrays:
        found.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


class Requests:
    """Requests that a bundle can draw, each with what it gives alone once that was asked for."""

    def __init__(self, manifest: Manifest, seed: int) -> None:
        self.manifest = manifest
        rng = random.Random(seed)  # noqa: S311 - requests, not secrets
        self._size = (manifest.latent.channels, manifest.latent.height, manifest.latent.width)
        guided = manifest.conditioning.guidable
        self.requests = [self._request(rng, guided=guided and index % 3 == 0) for index in range(12)]
        noise = np.random.default_rng(seed)
        self.latents = [noise.standard_normal((n, *self._size)).astype(np.float32) for n in (1, 1, 2, 3)]
        factor = manifest.decoder.factor
        sides = (3, factor * self._size[1], factor * self._size[2])
        self.pictures = [noise.uniform(-1, 1, (n, *sides)).astype(np.float32) for n in (1, 1, 2)]

    def _request(self, rng: random.Random, *, guided: bool) -> dict[str, Any]:
        n, members = rng.randint(1, 6), list(self.manifest.members)
        usable = [name for name in members if not self.manifest.members[name].inpaints]
        found: dict[str, Any] = {"n": n, "seed": rng.randrange(1000), "steps": rng.randint(2, 5)}
        found["schedule"] = [rng.choice(usable) for _ in range(found["steps"])]
        found["solver"] = rng.choice(["ddim", "ddpm", "euler", "dpmpp-2m"])
        found["guidance"] = 2.5 if guided else 1.0
        if self.manifest.conditioning.kind == "class":
            found["labels"] = [rng.randrange(self.manifest.conditioning.classes) for _ in range(n)]
        else:
            found["prompt"] = [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(n)]
        return found

    def broken(self, index: int) -> tuple[dict[str, Any], int]:
        """Request ``index`` with one image that becomes NaN, and which."""
        request = {**self.requests[index], "solver": "ddim"}
        bad = index % request["n"]
        noise = np.random.default_rng(index).standard_normal((request["n"], *self._size)).astype(np.float32)
        noise[bad] = HUGE
        return {**request, "latents": noise}, bad


class Wrong(Exception):
    """What no caller may see."""


class From(Exception):
    """What a callback raises."""


@dataclass
class Caller:
    """The calls of one thread. ``alone``: what they gave by name and index; filled where ``learn``."""

    requests: Requests
    alone: dict[tuple[str, int], Any]
    rng: random.Random
    learn: bool = False

    def __post_init__(self) -> None:
        self.kept: deque[Any] = deque(maxlen=8)  # exceptions with their tracebacks, events, and results on the device
        self.owned: deque[tuple[NDArray[Any], str]] = deque(maxlen=4)

    def verbs(self) -> dict[str, tuple[Callable[[Runtime, int], Any], int]]:
        """Each with how many kinds of it there are."""
        n = len(self.requests.requests)
        found: dict[str, tuple[Callable[[Runtime, int], Any], int]] = {
            "sample": (self.sample, n),
            "device": (self.device, n),
            "iterate": (self.iterate, n),
            "callback": (self.callback, n),
            "partial": (self.partial, n),
            "not finite": (self.not_finite, n),
            "raises": (self.raises, n),
            "cancels": (self.cancels, n),
            "drops": (self.drops, n),
            "closed elsewhere": (self.closed_elsewhere, n),
            "impatient": (self.impatient, n),
            "exclusive": (self.exclusive, n),
            "time_member": (self.time_member, n),
            "time_step_kernels": (self.time_step_kernels, 1),
            "tells": (self.tells, 1),
            "bad input": (self.bad_input, 1),
        }
        if self.requests.manifest.decoder.kind != "none":
            found |= {"decode": (self.decode, len(self.requests.latents)), "images": (self.images, 4)}
        if ComponentName.VAE_ENCODER in self.requests.manifest.parts:
            found["encode"] = (self.encode, len(self.requests.pictures))
        return found

    def check(self, name: str, index: int, found: Any) -> None:
        if self.learn:
            self.alone[name, index] = found
        elif found != self.alone[name, index]:
            raise Wrong(f"{name} {index} gave {found}, alone {self.alone[name, index]}")

    def sample(self, runtime: Runtime, index: int) -> Any:
        result = runtime.sample(**self.requests.requests[index])
        return digest(result.latents, result.images)

    def device(self, runtime: Runtime, index: int) -> Any:
        found = runtime.sample(**self.requests.requests[index], output="device").device_latents
        for array, before in self.owned:
            if digest(array) != before:
                raise Wrong("latents that were left on the device were overwritten")
        if isinstance(found, np.ndarray):
            self.owned.append((found, digest(found)))
        return digest(np.from_dlpack(found))

    def iterate(self, runtime: Runtime, index: int) -> Any:
        events = runtime.iterate(**self.requests.requests[index], decode=False)
        seen = []
        for event in events:
            seen += [event.latents(), event.estimate()]
            self.kept.append(event)
        return digest(*seen)

    def callback(self, runtime: Runtime, index: int) -> Any:
        seen: list[NDArray[Any]] = []
        decodes = self.requests.manifest.decoder.kind != "none"

        def look(event: StepEvent) -> None:
            seen.append(event.preview() if decodes else event.estimate())
            if decodes:
                seen.append(runtime.decode(event.latents()))

        seen.append(runtime.sample(**self.requests.requests[index], callback=look).latents)
        return digest(*seen)

    def partial(self, runtime: Runtime, index: int) -> Any:
        request, bad = self.requests.broken(index)
        try:
            result = runtime.sample(**request, partial=True)
        except NotFinite as error:
            return [failed.image for failed in error.failed], request["n"]
        if [failed.image for failed in result.failed] != [bad]:
            raise Wrong(f"images {result.failed} failed, and not {bad} alone")
        keep = list(result.drawn)
        return digest(result.latents[keep], None if result.images is None else result.images[keep])

    def not_finite(self, runtime: Runtime, index: int) -> Any:
        request, bad = self.requests.broken(index)
        try:
            runtime.sample(**request)
        except NotFinite as error:
            self.kept.append(error)
            return str(error), [failed.image for failed in error.failed] == [bad]
        raise Wrong("latents that are not finite were returned")

    def raises(self, runtime: Runtime, index: int) -> Any:
        def callback(event: StepEvent) -> None:
            self.kept.append(event)
            raise From

        try:
            runtime.sample(**self.requests.requests[index], callback=callback)
        except From as error:
            self.kept.append(error)
            return True
        raise Wrong("the callback's exception was lost")

    def cancels(self, runtime: Runtime, index: int) -> Any:
        try:
            runtime.sample(**self.requests.requests[index], callback=lambda event: event.step < 2)
        except Cancelled as error:
            self.kept.append(error)
            return "by the callback" in str(error) or self.closing(error)
        raise Wrong("a request that was cancelled went on")

    def drops(self, runtime: Runtime, index: int) -> Any:
        events = runtime.iterate(**self.requests.requests[index])
        event = next(events)
        if index % 2:
            events.close()
        del events
        for each in (event, *(kept for kept in self.kept if isinstance(kept, StepEvent))):
            try:
                each.latents()
            except (BadInput, Cancelled):
                continue
            raise Wrong("an event that is over showed latents")
        return True

    def closed_elsewhere(self, runtime: Runtime, index: int) -> Any:
        """Another thread closes the iterator at any time."""
        events = runtime.iterate(**self.requests.requests[index], decode=False)
        closing = threading.Timer(0 if self.learn else self.rng.uniform(0, 0.01), events.close)
        closing.start()
        try:
            for event in events:
                event.latents()
        except (Cancelled, BadInput) as error:  # in the middle of a step, or of reading an event
            self.kept.append(error)
        finally:
            closing.join()
        return True

    def impatient(self, runtime: Runtime, index: int) -> Any:
        try:
            return self.alone["sample", index] == digest_of(
                runtime.sample(**self.requests.requests[index], timeout=self.rng.choice([0, 0.001, 0.1]))
            )
        except Busy:
            return True

    def exclusive(self, runtime: Runtime, index: int) -> Any:
        with runtime.exclusive():
            first = self.sample(runtime, index)
            return first, self.sample(runtime, (index + 1) % len(self.requests.requests))

    def time_member(self, runtime: Runtime, index: int) -> Any:
        name = runtime.members[index % len(runtime.members)]
        return len(runtime.time_member(name, 1, repeats=2, warmup=0))

    def time_step_kernels(self, runtime: Runtime, index: int) -> Any:
        return len(runtime.time_step_kernels(2, repeats=3, warmup=0))

    def tells(self, runtime: Runtime, index: int) -> Any:
        """What depends on no request. It must not wait, and not fail while others close the runtime."""
        memory = runtime.memory()
        told = (runtime.graphs().mode, runtime.loras, runtime.jit_ms().keys() == runtime.manifest.networks().keys())
        return memory["arena"] > 0, str(told), str((runtime.splitting, runtime.limits, runtime.members, runtime.setup))

    def bad_input(self, runtime: Runtime, index: int) -> Any:
        try:
            runtime.sample(n=0)
        except BadInput as error:
            return str(error)
        raise Wrong("a request of no images was accepted")

    def decode(self, runtime: Runtime, index: int) -> Any:
        return digest(runtime.decode(self.requests.latents[index]))

    def images(self, runtime: Runtime, index: int) -> Any:
        return digest(runtime.images(self.requests.latents[index]))

    def encode(self, runtime: Runtime, index: int) -> Any:
        return digest(*runtime.encode(self.requests.pictures[index]))

    def closing(self, error: TStitchError) -> bool:
        return isinstance(error, Closed) or "was closed while" in str(error)


def digest_of(result: tstitch_trt.Result) -> str:
    return digest(result.latents, result.images)


# --- many of them at once


class Use(NamedTuple):
    """What the process uses at a time: seconds since the start, bytes of memory, open files, threads."""

    at: float
    memory: int
    files: int
    threads: int


def use_now(started: float, process: int | str = "self") -> Use:
    """``process``: its id."""
    resident = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    files, native = (sum(1 for _ in Path(f"/proc/{process}/{name}").iterdir()) for name in ("fd", "task"))
    return Use(round(monotonic() - started, 2), resident, files, native)


def growth(uses: Sequence[Use]) -> list[str]:
    """What never comes down in the last quarter to what it was at most in the second."""
    quarter = len(uses) // 4
    if quarter < 2:
        return []
    early, late = uses[quarter : 2 * quarter], uses[-quarter:]
    found = []
    for name, allowed in (("memory", MEMORY), ("files", 0), ("threads", 0)):
        before, after = max(getattr(use, name) for use in early), min(getattr(use, name) for use in late)
        if after > before + allowed:
            found.append(f"{name} grew from {before} to {after}; allowed are {allowed} more")
    return found


class Soak:
    """``threads`` callers of one runtime, which one of them replaces now and then."""

    def __init__(self, bundle: Path, load: Mapping[str, Any], threads: int, seed: int) -> None:
        self._load: Callable[[], Runtime] = partial(tstitch_trt.load, bundle, **load)
        self._threads = threads
        self._seed = seed
        self._runtime = self._load()
        self._requests = Requests(self._runtime.manifest, seed)
        self._alone: dict[tuple[str, int], Any] = {}
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._violations: list[str] = []
        self._until = 0.0
        self._reloads = 0

    def run(self, seconds: float) -> dict[str, Any]:
        alone = Caller(self._requests, self._alone, random.Random(0), learn=True)  # noqa: S311
        for name, (verb, kinds) in alone.verbs().items():
            for index in range(kinds):
                try:
                    alone.check(name, index, verb(self._runtime, index))
                except Wrong as error:
                    self._violated(f"alone, {name}", error)
        del alone
        started = monotonic()
        self._until = started + seconds
        workers = [threading.Thread(target=self._work, args=(number,)) for number in range(self._threads)]
        for worker in workers:
            worker.start()
        uses = []
        with progress_bar("soaking", counted="s") as bar:
            while monotonic() < self._until and not self._violations:
                sleep(min(1.0, seconds / 100))
                uses.append(use_now(started))
                bar.update(done=int(monotonic() - started), total=int(seconds) + 1)
        self._until = 0.0
        for worker in workers:
            worker.join(60)
        hung = [worker.name for worker in workers if worker.is_alive()]
        if hung:
            self._violations.append(f"{len(hung)} threads did not come back within 60 s")
        else:
            self._runtime.close()
            self._violations += growth(uses)
        calls = self._calls.total()
        return {
            "bundle": self._requests.manifest.name,
            "backend": self._runtime.backend_name,
            "threads": self._threads,
            "seconds": round(monotonic() - started, 1),
            "calls": calls,
            "calls_by_verb": dict(sorted(self._calls.items())),
            "refused": dict(sorted(self._refused.items())),
            "reloads": self._reloads,
            "violations": self._violations,
            "memory_bytes": [statistics.median(use.memory for use in part) for part in quarters(uses)],
            "uses": {"fields": Use._fields, "rows": [list(use) for use in uses[:: max(1, len(uses) // 200)]]},
        }

    def _work(self, number: int) -> None:
        rng = random.Random(f"{self._seed} {number}")  # noqa: S311
        caller = Caller(self._requests, self._alone, rng)
        verbs = caller.verbs()
        while monotonic() < self._until:
            name = rng.choice(list(verbs))
            verb, kinds = verbs[name]
            runtime, index = self._runtime, rng.randrange(kinds)
            try:
                found = verb(runtime, index)
                caller.check(name, index, found)
            except (Closed, Cancelled) as error:
                if runtime is self._runtime or not caller.closing(error):
                    self._violated(name, error)
                self._count(self._refused, type(error).__name__)
            except BaseException as error:
                self._violated(name, error)
            self._count(self._calls, name)
            if number == 0 and rng.random() < 0.02:
                self._replace(rng)

    def _replace(self, rng: random.Random) -> None:
        """Another runtime in place of the one that the others are in, which is closed in one of the ways there are."""
        before, self._runtime = self._runtime, self._load()
        self._reloads += 1
        way = rng.randrange(3)
        try:
            if way == 0:
                before.close(timeout=0.002)
        except Busy:
            self._count(self._refused, "Busy")
        if way != 2:
            before.close(cancel=way == 1)
        else:
            with before:
                pass
        del before
        gc.collect()

    def _count(self, counter: Counter[str], name: str) -> None:
        with self._lock:
            counter[name] += 1

    def _violated(self, name: str, error: BaseException) -> None:
        with self._lock:
            self._violations.append(f"{name}: {type(error).__name__}: {error}")


def quarters(uses: Sequence[Use]) -> list[Sequence[Use]]:
    size = max(1, len(uses) // 4)
    return [part for part in (uses[start : start + size] for start in range(0, len(uses), size)) if part][:4]


if __name__ == "__main__":
    sys.exit(main())
