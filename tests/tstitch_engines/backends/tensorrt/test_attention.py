"""What attention becomes, read from the plans that TensorRT-RTX compiles: they hold the source of their kernels."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from support.tensorrt_builds import attention_graph, compile_member, compile_request
from tstitch_engines.backends.tensorrt import TensorRtBackend, attention
from tstitch_engines.backends.tensorrt.messages import Done
from tstitch_engines.backends.tensorrt.options import BuildOptions
from tstitch_engines.backends.tensorrt.worker import compile_engine
from tstitch_engines.child import Channel
from tstitch_engines.errors import BuildFailed, UnknownName

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")


def compiled(folder: Path, dtype: str, head: int, opset: int = 23, **options: Any) -> tuple[Done, bytes]:
    """What the compiling process answers, and the plan for compute capability 8.9."""
    model = folder / "attention.onnx"
    member = attention_graph(model, dtype=dtype, head=head, opset=opset)
    request = compile_request(
        member, model, folder / "a.rtx", options=BuildOptions(capabilities=(89,), max_aux_streams=0, **options)
    )
    done = compile_engine(request, Channel(io.BytesIO()))
    return done, (folder / "a.rtx").read_bytes()


def sums(plan: bytes) -> set[str]:
    """The types that its fused attention kernels add in, one word for each of their two products."""
    return {found.decode() for found in re.findall(rb"fmha::Ampere_hmma_(\w+)_traits", plan)}


@pytest.mark.parametrize(
    ("dtype", "options", "said", "types"),
    [
        ("float16", {}, "1 fused, 1 of them with sums in float32", {"fp32"}),
        ("float16", {"fp16_sums": True}, "1 fused", {"fp16", "fp32"}),  # of queries and keys in float16
        ("bfloat16", {}, "1 fused", {"bf16"}),  # tensor cores add bfloat16 in float32
        ("float32", {}, "", set()),
    ],
)
def test_fused_attention_adds_in_float32(
    tmp_path: Path, dtype: str, options: dict[str, Any], said: str, types: set[str]
) -> None:
    done, plan = compiled(tmp_path, dtype, 64, **options)
    assert done.attention == said
    assert sums(plan) == types


def test_products_and_softmax_are_fused_too_unless_kept_apart(tmp_path: Path) -> None:
    done, plan = compiled(tmp_path, "float16", 64, opset=22)
    assert (done.attention, sums(plan)) == ("1 left to the builder", {"fp16"})
    done, plan = compiled(tmp_path, "float16", 64, opset=22, attention="apart")
    assert (done.attention, sums(plan)) == ("1 kept apart", set())
    assert b"gemm_mha" not in plan


def test_where_a_kernel_is_missing_it_is_compiled_again_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Heads of 8 have none: here they are taken to have one, as of a version or GPU that lacks it."""
    monkeypatch.setattr(attention, "_FUSED_HEADS", (8, 256))
    caplog.set_level(logging.WARNING, "tstitch_engines")
    done, plan = compiled(tmp_path, "float16", 8)
    assert (done.attention, sums(plan)) == ("1 left to the builder", set())
    assert "attention.onnx: there is no fused kernel for all of its attention (1 fused, 1 of them with" in caplog.text
    with pytest.raises(BuildFailed, match=r"attention: 1 fused.*not supported by a dedicated kernel") as caught:
        compiled(tmp_path, "float16", 8, attention="fused")
    assert "leave out --option attention=fused" in caught.value.hint


def test_fused_is_kept_to_whatever_the_head(rtx: TensorRtBackend, tmp_path: Path) -> None:
    """Through the child, as a build does it."""
    model = tmp_path / "attention.onnx"
    member = attention_graph(model, dtype="float16", head=8)
    notes: dict[str, str] = {}
    assert compile_member(rtx, member, model, tmp_path / "a.rtx", note=notes.__setitem__).exists()
    assert notes == {"attention": "1 left to the builder"}
    with pytest.raises(BuildFailed, match="not supported by a dedicated kernel"):
        compile_member(rtx, member, model, tmp_path / "b.rtx", options={"attention": "fused"})


@pytest.mark.parametrize(
    ("opset", "option", "words", "hint"),
    [
        (23, "apart", "can't take Attention nodes apart", "with --option attention=apart"),
        (22, "fused", "can't require a fused kernel", "with --option opset=23"),
    ],
)
def test_an_export_that_the_option_does_not_go_with(
    tmp_path: Path, opset: int, option: str, words: str, hint: str
) -> None:
    with pytest.raises(BuildFailed, match=words) as caught:
        compiled(tmp_path, "float16", 64, opset=opset, attention=option)
    assert hint in caught.value.hint


def test_another_word_for_it(rtx: TensorRtBackend) -> None:
    with pytest.raises(UnknownName, match=r"value of option attention 'fuse'; known: any, fused, apart"):
        rtx.build_arch("cpu", {"attention": "fuse"})
