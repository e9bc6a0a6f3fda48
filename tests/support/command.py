"""Runs the command line as a user would see it: exit code, stdout, stderr."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tstitch_trt.cli import main

__all__ = ["Command", "Outcome", "refused"]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Command:
    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *args: object) -> Outcome:
        self._capfd.readouterr()
        code = main([str(arg) for arg in args])
        captured = self._capfd.readouterr()
        return Outcome(code, captured.out, captured.err)


def refused(outcome: Outcome, *parts: str) -> None:
    """Bad input: exit code 2, nothing on stdout, the value and what is allowed in ``error:``, a ``hint:`` after it."""
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    lines = outcome.err.strip().splitlines()
    assert lines[-2].startswith("error: "), outcome.err
    assert lines[-1].startswith("hint: "), outcome.err
    assert len(lines[-1]) > len("hint: see ")
    for part in parts:
        assert part in "\n".join(lines[-2:]), outcome.err


Run = Callable[..., Outcome]
