"""What other libraries print is kept away, and stdout, warnings and loggers are the process's own again afterwards."""

from __future__ import annotations

import logging
import sys
import threading
import warnings

import pytest

from tstitch_engines.quiet import silence_output


def test_what_is_printed_goes_to_the_debug_log(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "tstitch_engines.quiet"), silence_output(stderr=True):
        print("chatter")
        print("noise", file=sys.stderr)
        warnings.warn("old", stacklevel=1)
        with silence_output():
            print("more")
    assert capsys.readouterr() == ("", "")
    assert caplog.messages == ["chatter", "noise", "more", "old"]


def test_warnings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with silence_output(stdout=False):
        print("data")
        warnings.warn("old", stacklevel=1)
    assert capsys.readouterr() == ("data\n", "")


@pytest.mark.parametrize("stderr", [False, True])
def test_blocks_of_several_threads_leave_nothing_behind(stderr: bool) -> None:
    """They end in the order they began in, not the other way round as nested ones do."""
    logger = logging.getLogger("torch.onnx")
    before = (sys.stdout, sys.stderr, list(warnings.filters), logger.level)
    begun, ended = threading.Event(), threading.Event()

    def second() -> None:
        with silence_output(stderr=stderr):
            begun.set()
            assert ended.wait(30)

    thread = threading.Thread(target=second)
    with silence_output():
        thread.start()
        assert begun.wait(30)
    ended.set()
    thread.join(30)
    assert (sys.stdout, sys.stderr, list(warnings.filters), logger.level) == before
