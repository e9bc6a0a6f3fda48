"""All of several things are done, whatever some of them raise."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from tstitch_engines.closing import do_all


def test_all_are_done_and_the_first_failure_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []

    def step(name: str, error: BaseException | None = None) -> Callable[[], None]:
        def do() -> None:
            done.append(name)
            if error is not None:
                raise error

        return do

    do_all(step("a"), step("b"))
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="first"):
        do_all(step("c", ValueError("first")), step("d", OSError("second")), step("e"))
    assert [record.getMessage() for record in caplog.records] == ["not the only failure: second"]
    with pytest.raises(KeyboardInterrupt):
        do_all(step("f", ValueError("first")), step("g", KeyboardInterrupt()), step("h"))
    assert "".join(done) == "abcdefgh"
