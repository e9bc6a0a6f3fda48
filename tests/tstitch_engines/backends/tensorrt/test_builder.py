"""What TensorRT's builder is asked, over a library that stands in for it: TensorRT itself needs a GPU to compile."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path

import pytest

from support.tensorrt_build_stand import BuildStand
from support.tensorrt_builds import compile_request, shipped_small
from tstitch_engines.backends.tensorrt import library
from tstitch_engines.backends.tensorrt.flavour import TENSORRT
from tstitch_engines.backends.tensorrt.messages import Done
from tstitch_engines.backends.tensorrt.options import BuildOptions
from tstitch_engines.backends.tensorrt.worker import compile_engine
from tstitch_engines.child import Channel
from tstitch_engines.errors import BuildFailed


@pytest.fixture(autouse=True)
def _own_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_made", {})


def compiled(stand: BuildStand, output: Path, monkeypatch: pytest.MonkeyPatch, options: BuildOptions) -> Done:
    monkeypatch.setitem(sys.modules, "tensorrt", stand.library)
    member, model = shipped_small()
    request = compile_request(member, model, output, flavour=TENSORRT, options=options)
    return compile_engine(request, Channel(io.BytesIO()))


@pytest.mark.parametrize(
    "no_kernel",
    [
        "Attention operation was not supported by a dedicated kernel.",
        "Error Code 10: Internal Error (Could not find any implementation for node {ForeignNode[a...b]}.)",
    ],
)
def test_a_fused_kernel_is_required_first_and_then_let_go_in_words(
    no_kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "tstitch_engines")
    stand = BuildStand(half_heads=(64, 72), kernels=(64, 72))
    assert compiled(stand, tmp_path / "a", monkeypatch, BuildOptions()).attention == "2 fused"
    assert (stand.asked, caplog.text) == ([[False, False]], "")
    stand = BuildStand(half_heads=(64, 72), kernels=(64,), no_kernel=no_kernel)
    assert compiled(stand, tmp_path / "a", monkeypatch, BuildOptions()).attention == "2 left to the builder"
    assert stand.asked == [[False, False], [True, True]]
    assert "no fused kernel for all of its attention (2 fused); compiled again without requiring one" in caplog.text


def test_fused_fails_where_there_is_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = BuildStand(half_heads=(64, 8), kernels=(64,))
    assert compiled(stand, tmp_path / "a", monkeypatch, BuildOptions()).attention == "1 fused, 1 left to the builder"
    with pytest.raises(BuildFailed, match=r"TensorRT 10\.16\.1\.11 can't compile .*dedicated kernel") as caught:
        compiled(stand, tmp_path / "a", monkeypatch, BuildOptions(attention="fused"))
    assert "leave out --option attention=fused" in caught.value.hint
    assert stand.asked == [[False, True], [False, False]]


def test_two_builds_at_once_both_add_to_the_timing_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second runs whole in the middle of the first, which had read the file before."""
    times = tmp_path / "times.bin"
    times.write_text(json.dumps(["old"]))
    options = BuildOptions(timing_cache=str(times))
    first, second = BuildStand(timed="first"), BuildStand(timed="second")
    first.building = lambda: (compiled(second, tmp_path / "b", monkeypatch, options), None)[1]
    compiled(first, tmp_path / "a", monkeypatch, options)
    assert json.loads(times.read_text()) == ["first", "old", "second"]
