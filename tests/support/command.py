"""Runs the command line as a user would see it: exit code, stdout, stderr."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jsonschema
import pytest

from tstitch_trt.cli import main

__all__ = ["Command", "Outcome", "check_document", "refused"]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@cache
def _validator(name: str) -> jsonschema.Draft202012Validator:
    from tstitch_trt.cli._documents import json_schema

    schema = json_schema()
    return jsonschema.Draft202012Validator({**schema, **schema["documents"][name]})


def check_document(words: list[str], document: Any) -> None:
    """What a command prints with ``--json`` is what its schema says."""
    name = " ".join(words[:2]) if words[0] == "cache" else words[0]
    name += "".join(f" {flag}" for flag in ("--ray", "--list") if flag in words)
    _validator(name).validate(document)


class Command:
    """Runs commands. Every document that one prints with ``--json`` is held against its schema."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *args: object) -> Outcome:
        self._capfd.readouterr()
        code = main([str(arg) for arg in args])
        captured = self._capfd.readouterr()
        if "--json" in args and captured.out:
            check_document([str(arg) for arg in args], json.loads(captured.out))
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
