"""One JSON per part, written after every step of it, so that nothing measured is lost and nothing is done twice."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from tstitch_engines.errors import TStitchError, Unavailable
from tstitch_trt.files import write_text
from tstitch_trt.study.machine import describe_machine, gpu_names
from tstitch_trt.study.statistics import spread

__all__ = ["FINISHED", "Context", "Entry", "NotRun", "Part", "place_of", "spread_of"]

Entry = dict[str, Any]

NO_CUDA: Final = "no CUDA device"
FINISHED: Final = ("done",)  # a part in another state is taken up again
_TRIES: Final = 2  # an entry during which the process ended this often is not tried again


class NotRun(Exception):
    """This machine can't run the part (or entry): the reason."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every part is given. ``deadline``: when it should have ended, on the clock of ``time.monotonic``."""

    out: Path
    scratch: Path
    smoke: bool
    device: str
    deadline: float
    rounds: int
    only: tuple[str, ...]  # contenders, empty for all
    command: str
    data: Path | None = None
    train_minutes: float = 12.0
    rtx_sites: dict[str, Path] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device != "cpu"

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def need_cuda(self) -> None:
        if not self.cuda:
            raise NotRun(NO_CUDA)


class Part:
    """The record of one part. ``entries`` are its steps in the order of their first try."""

    def __init__(self, context: Context, name: str, case: Entry) -> None:
        self.context = context
        self.path = context.out / f"{name}.json"
        self.pending = False
        self._tried = 0
        same: Entry = {"smoke": context.smoke, **place_of(context.device), "case": case}
        self.data: Entry = {"part": name, "status": "running", **same, "entries": {}}
        old = read_part(self.path)
        if old is not None and all(old.get(key) == value for key, value in same.items()):
            self.data["entries"] = old["entries"]
            for entry in self.entries.values():
                if entry["status"] == "running" and entry["tries"] >= _TRIES:
                    entry |= {"status": "failed", "reason": f"the process ended {_TRIES} times while this ran"}
        self.data |= {
            "command": context.command,
            "machine": msgspec.to_builtins(describe_machine()),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self.save()

    @property
    def entries(self) -> dict[str, Entry]:
        found: dict[str, Entry] = self.data["entries"]
        return found

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.data, indent=1, allow_nan=False, default=_plain) + "\n")

    def attempt(self, name: str, work: Callable[[Entry], Entry | None], *, reserve: float = 0.0) -> Entry | None:
        """Does ``work`` unless that was done before; its entry when it ended well, else ``None``.

        ``work`` may put what it has so far into the entry it is given. ``reserve``: seconds it is expected to take;
        with less left it is put off to the next run, unless it is the first of this one.
        """
        entry = self.entries.get(name)
        if entry is not None and entry["status"] not in ("running", "put off", "not run"):
            return entry if entry["status"] == "ok" else None
        tries = 0 if entry is None else int(entry["tries"])
        if self._tried and self.context.seconds_left() < reserve:
            self.entries[name] = {"status": "put off", "tries": tries, "reason": f"it needs about {reserve:.0f} s"}
            self.pending = True
            self.save()
            return None
        self._tried += 1
        entry = self.entries[name] = {"status": "running", "tries": tries + 1}
        self.save()
        started = time.monotonic()
        try:
            entry |= work(entry) or {}
            entry["status"] = "ok"
        except (NotRun, Unavailable) as error:
            entry |= {"status": "not run", "reason": str(error)}
        except TStitchError as error:
            entry |= {"status": "failed", "reason": str(error)}
        except Exception as error:  # whatever a contender's library raises is a result
            entry |= {"status": "failed", "reason": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        entry["seconds"] = round(time.monotonic() - started, 2)
        self.save()
        return entry if entry["status"] == "ok" else None

    def finish(self, run: Callable[[], None]) -> None:
        """Runs the whole part and records how it ended."""
        try:
            run()
            self.data["status"] = "partial" if self.pending else "done"
        except NotRun as error:
            self.data |= {"status": "not run", "reason": f"not run: {error}"}
        except BaseException as error:
            self.data |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
            self.save()
            raise
        self.save()


def place_of(device: str) -> Entry:
    """What a record names so that nothing measured elsewhere is taken for its own: the device and the GPUs' models."""
    return {"device": device, "gpus": [] if device == "cpu" else [name.rpartition(",")[0] for name in gpu_names()]}


def read_part(path: Path) -> Entry | None:
    """The record at ``path``; ``None`` when there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("entries"), dict) else None


def spread_of(values: list[float]) -> Entry:
    """Median, 10th and 90th percentile, and how many."""
    middle, low, high = spread(values)
    return {"median": middle, "p10": low, "p90": high, "count": len(values)}


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} in a result")
