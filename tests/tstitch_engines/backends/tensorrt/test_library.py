"""What the library says reaches whoever asks: no error is lost among noise or in a flood."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.tensorrt_builds import compile_request, shipped_small
from tstitch_engines.backends.tensorrt.flavour import RTX
from tstitch_engines.backends.tensorrt.library import Session, open_library, session
from tstitch_engines.backends.tensorrt.worker import compile_engine
from tstitch_engines.child import Channel

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")

CAUGHT = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at /_src/a.cpp:250 ({}))"
NO_DRIVER = CAUGHT.format("cudaError 35: CUDA driver version is insufficient for CUDA runtime version")
ILLEGAL = CAUGHT.format("cudaError 700: an illegal memory access was encountered")


@pytest.fixture
def opened() -> Iterator[Session]:
    with session(RTX, open_library(RTX)) as found:
        yield found


def say(opened: Session, severity: str, text: str) -> None:
    opened.logger.log(getattr(opened.library.ILogger, severity), text)


def test_an_error_of_cuda_is_an_error_unless_it_repeats_that_there_is_no_driver(opened: Session) -> None:
    say(opened, "ERROR", "the call failed (cudaError 35: CUDA driver version is insufficient)")
    say(opened, "ERROR", NO_DRIVER)
    assert opened.messages.reason() == "the call failed (cudaError 35: CUDA driver version is insufficient)"
    say(opened, "ERROR", ILLEGAL)
    assert "cudaError 700" in opened.messages.reason()


def test_a_missing_driver_is_said_where_nothing_else_is(opened: Session) -> None:
    say(opened, "ERROR", NO_DRIVER)
    assert opened.messages.reason() == NO_DRIVER


def test_of_an_int64_input_only_the_usual_warning_is_left_out(opened: Session) -> None:
    say(opened, "WARNING", "Make sure input labels has Int64 binding.")
    assert opened.messages.warnings == []
    say(opened, "ERROR", "input labels has Int64 binding, which this plugin does not take")
    say(opened, "WARNING", "output y has Int64 binding; it is narrowed to Int32")
    assert "this plugin" in opened.messages.reason()
    assert opened.messages.warnings == ["output y has Int64 binding; it is narrowed to Int32"]


def test_what_comes_late_in_a_flood_is_not_lost(opened: Session) -> None:
    messages = opened.messages
    for number in range(1000):
        say(opened, "WARNING", f"warning {number}")
        say(opened, "ERROR", f"error {number}")
    say(opened, "WARNING", "Profile kMAX values are not self-consistent")
    say(opened, "ERROR", "Error Code 2: OutOfMemory (out of memory)")
    for number in range(1000):
        say(opened, "WARNING", f"later warning {number}")
        say(opened, "ERROR", f"later error {number}")
    assert messages.inconsistent == "Profile kMAX values are not self-consistent"
    assert messages.of_memory()
    assert messages.reason().startswith("error 0; error 1;")
    assert "later error 999; and 1801 more errors" in messages.reason()
    assert len(messages.warnings) == len(messages.errors) == 200


@pytest.mark.parametrize(("level", "some"), [("DEBUG", True), ("INFO", False)])
def test_verbose_lines_go_to_the_parent_only_where_it_listens(
    tmp_path: Path, level: str, some: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Thousands of lines come from the builder's threads while it works; the level is that of the parent's call."""
    member, model = shipped_small()
    sent = io.BytesIO()
    caplog.set_level(getattr(logging, level), "tstitch_engines")
    compile_engine(compile_request(member, model, tmp_path / "a.rtx"), Channel(sent))
    assert b"said" not in sent.getvalue()
    assert (len(caplog.records) > 100) == some
