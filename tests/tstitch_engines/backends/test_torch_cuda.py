"""What engines on PyTorch share in one process on CUDA: its settings on any machine, its memory on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tstitch_trt
from support.recordings import others_may_record
from support.tiny import TinyPair
from tstitch_engines.backends.torch_cuda import EXACT, Workspaces
from tstitch_engines.device.open import open_device
from tstitch_engines.errors import Unavailable
from tstitch_engines.spec import Range
from tstitch_export.build import build

torch = pytest.importorskip("torch")


def precisions() -> tuple[str, ...]:
    cudnn = torch.backends.cudnn
    return (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.fp32_precision, torch.backends.fp32_precision)


needs_precisions = pytest.mark.skipif(
    not hasattr(torch.backends.cudnn, "conv"), reason="this PyTorch has one switch for TF32 only"
)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    if hasattr(torch.backends.cudnn, "conv"):
        torch.backends.fp32_precision = torch.backends.cudnn.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True


def test_the_first_thread_out_does_not_bring_tf32_back_to_the_others() -> None:
    cudnn = torch.backends.cudnn
    assert cudnn.allow_tf32
    other_in, first_out, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with EXACT(torch):
            other_in.set()
            assert first_out.wait(10)
            seen.append(cudnn.allow_tf32)

    thread = threading.Thread(target=other)
    with EXACT(torch):
        thread.start()
        assert other_in.wait(10)
    first_out.set()
    thread.join()
    assert seen == [False]
    assert cudnn.allow_tf32


@needs_precisions
@pytest.mark.parametrize(
    "choose",
    [
        lambda cudnn: None,
        lambda cudnn: setattr(cudnn, "allow_tf32", False),
        lambda cudnn: setattr(cudnn.conv, "fp32_precision", "ieee"),
        lambda cudnn: setattr(cudnn, "fp32_precision", "tf32"),
        lambda cudnn: setattr(torch.backends, "fp32_precision", "ieee"),
    ],
    ids=["default", "switch", "convolutions", "cuDNN", "everything"],
)
def test_what_the_user_chose_is_put_back(choose: Callable[[Any], None]) -> None:
    cudnn = torch.backends.cudnn
    choose(cudnn)
    before = precisions()
    with EXACT(torch):
        assert precisions()[:2] == ("ieee", "ieee")
        assert not cudnn.allow_tf32  # TorchInductor reads it, and PyTorch raises where the settings contradict
    assert precisions() == before


@needs_precisions
def test_convolutions_follow_a_setting_for_everything_as_before() -> None:
    torch.backends.fp32_precision = "ieee"
    with EXACT(torch):
        pass
    torch.backends.fp32_precision = "tf32"
    assert precisions() == ("tf32",) * 4


@needs_precisions
def test_a_choice_made_meanwhile_stays() -> None:
    convolutions = torch.backends.cudnn.conv
    with EXACT(torch):
        convolutions.fp32_precision = "tf32"
        with EXACT(torch):
            assert convolutions.fp32_precision == "ieee"
    assert convolutions.fp32_precision == "tf32"


def test_the_one_switch_of_older_versions() -> None:
    cudnn = SimpleNamespace(allow_tf32=True)
    older = SimpleNamespace(backends=SimpleNamespace(cudnn=cudnn))
    with EXACT(older):
        with EXACT(older):
            assert not cudnn.allow_tf32
        assert not cudnn.allow_tf32
    assert cudnn.allow_tf32


def test_workspaces_are_freed_with_the_last_engine_unless_a_graph_may_use_one() -> None:
    class CUDAGraph:
        pass

    class Held:
        pass

    freed: list[bool] = []
    library = SimpleNamespace(
        _C=SimpleNamespace(_cuda_clearCublasWorkspaces=lambda: freed.append(others_may_record())),
        cuda=SimpleNamespace(CUDAGraph=CUDAGraph),
    )
    workspaces, one, two, dropped = Workspaces(), Held(), Held(), Held()
    for engine in (one, two, dropped):
        workspaces.hold(engine)
    del engine, dropped
    workspaces.release(library, one)
    assert not freed
    workspaces.release(library, two)
    assert freed == [False]
    graph = CUDAGraph()
    workspaces.hold(one)
    workspaces.release(library, one)
    assert freed == [False]
    del graph
    workspaces.hold(one)
    workspaces.release(library, one)
    assert freed == [False, False]


@pytest.mark.gpu
def test_twenty_runtimes_one_after_another_leave_nothing(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """A workspace of cuBLAS has 8 MiB or more. Not run on a GPU yet."""
    try:
        open_device("cuda")
        build(
            tiny_pair.recipe("small", "large"),
            members={name: tiny_pair.checkpoint(name) for name in ("small", "large")},
            output=tmp_path / "x.bundle",
            backend="torch",
            device="cuda",
            profile=Range(1, 4, 8),
        )
    except Unavailable as error:
        pytest.skip(error.message)
    free = []
    for _ in range(20):
        with tstitch_trt.load(tmp_path / "x.bundle", device="cuda") as runtime:
            runtime.sample(n=2, steps=2)
        del runtime
        free.append(torch.cuda.mem_get_info()[0])
    assert free[4] - free[-1] < 8 << 20, free
