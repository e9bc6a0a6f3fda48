"""Inputs that somebody made to do harm: how they are made from good ones, and what may come of them."""

from __future__ import annotations

import copy
import json
import resource
import time
from collections.abc import Callable
from typing import Any, Final

from hypothesis import strategies as st

from tstitch_engines.errors import TStitchError

__all__ = ["ABSURD", "altered", "altered_bytes", "dumps", "only_our_errors"]

_SECONDS: Final = 2
_BYTES: Final = 1 << 30

ABSURD: Final[tuple[Any, ...]] = (
    *(None, True, False, -1, 0, 1, 2, 7, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30), 0.5, -0.0, 1e-300),
    *(
        1e300,
        float("nan"),
        float("inf"),
        -float("inf"),
        "",
        "x",
        "small",
        "B",
        "../x",
        "/etc/passwd",
        "a\0b",
        "\x1b[2J",
    ),
    *("\ud800", "1" * 5000, "a" * 100_000, "9*B", "B/0", [], [[]], {}, {"": {}}, [None], [1] * 5000, {"a": {"b": [1]}}),
)


def only_our_errors(call: Callable[[], object]) -> TStitchError | None:
    """The error of ``call``, if any. Another kind than ours passes on and fails the test, as do 2 s and 1 GB."""
    before, start = _peak(), time.process_time()  # of this process alone: others share the machine
    found = None
    try:
        call()
    except TStitchError as error:
        found = error
    assert time.process_time() - start < _SECONDS
    assert _peak() - before < _BYTES
    assert found is None or (found.message and found.hint and len(str(found)) < 20_000)
    return found


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@st.composite
def altered(draw: st.DrawFn, good: Any, *, most: int = 3) -> Any:
    """``good`` (dicts, lists, scalars) with one to ``most`` values replaced, left out, renamed or moved."""
    data = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(data))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        other, there = draw(st.sampled_from(places))
        match draw(st.sampled_from(["absurd", "absurd", "absurd", "swap", "drop", "rename", "number"])):
            case "absurd":
                holder[key] = copy.deepcopy(draw(st.sampled_from(ABSURD)))
            case "swap":
                holder[key] = copy.deepcopy(other[there])
            case "drop":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                name = draw(st.sampled_from([there if isinstance(there, str) else "x", "", "\0", "a" * 3000]))
                holder[name] = holder.pop(key)
            case _:
                holder[key] = draw(st.one_of(st.integers(), st.floats(), st.text(max_size=20)))
    return data


def _places(data: Any) -> Any:
    stack = [data]
    while stack:
        holder = stack.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            yield holder, key
            if isinstance(holder[key], dict | list):
                stack.append(holder[key])


@st.composite
def altered_bytes(draw: st.DrawFn, good: bytes) -> bytes:
    """``good`` cut short, or with a few bytes changed, repeated or put in."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["cut", "change", "insert", "repeat", "long"])):
            case "cut":
                del data[at:]
            case "change":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "insert":
                data[at:at] = draw(st.binary(max_size=8))
            case "repeat":
                data[at:at] = data[at : at + 40] * draw(st.sampled_from([1, 100]))
            case "long":  # of whole numbers in headers
                data[at : at + 8] = draw(st.sampled_from([b"\xff" * 8, bytes(8), b"\0" * 6 + b"\1\0", b"\xff" * 4]))
    return bytes(data)


def dumps(data: Any) -> bytes:
    """JSON as nobody should write it: NaN, and half characters."""
    return json.dumps(data).encode("ascii")
