"""The ONNX opset of an export: the usual one of its precision, what was asked for, or what the backend takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from support.exports import graph_of, network_plan, onnx_of
from support.rtx_families import CHECKPOINTS
from support.tiny import TinyPair
from support.tiny_checkpoints import planned
from tstitch_engines.errors import BadInput
from tstitch_engines.spec import Range
from tstitch_export.build import build


def newest(number: int) -> Any:
    return lambda options: (20, number, "the library knows no newer")


def test_the_usual_one_is_that_of_the_precision(tiny_pair: TinyPair) -> None:
    plan = planned(
        tiny_pair.recipe("small", "large"),
        members={name: tiny_pair.checkpoint(name) for name in ("small", "large")},
        precision={"large": "fp16"},
    )
    assert [member.opset for member in plan.members] == [20, 23]


@pytest.mark.parametrize(("precision", "opset"), [("fp32", 20), ("fp16", 22), ("bf16", 22)])
def test_a_backend_that_takes_no_newer_one_gets_it_in_words(tiny_pair: TinyPair, precision: str, opset: int) -> None:
    plan = planned(
        tiny_pair.recipe("small"),
        members={"small": tiny_pair.checkpoint("small")},
        precision=precision,
        opset_limits=newest(22),
    )
    assert plan.members[0].opset == opset
    said = [note for note in plan.conventions.notes if "exported with ONNX opset 22: the library knows no" in note]
    assert len(said) == (precision != "fp32")


@pytest.mark.parametrize(
    ("options", "precision", "words"),
    [
        ({"opset": 19}, "fp32", "option opset is 19; allowed is a whole number from 20 to 23"),
        ({"opset": "24"}, "fp16", "option opset is 24; allowed is a whole number from 20 to 23"),
        ({"opset": "new"}, "fp16", "option opset of the export is 'new'; allowed is a whole number"),
        ({"opset": 21}, "bf16", "option opset is 21, and a network in bf16 needs 22"),
        ({"opset": 23}, "fp16", "option opset is 23, but the library knows no newer"),
    ],
)
def test_one_that_can_t_be_had(tiny_pair: TinyPair, options: Any, precision: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        planned(
            tiny_pair.recipe("small"),
            members={"small": tiny_pair.checkpoint("small")},
            precision=precision,
            options=options,
            opset_limits=newest(22),
        )


def test_one_that_leaves_out_what_the_options_need(tiny_pair: TinyPair) -> None:
    def asked(precision: str, opset: int) -> int:
        plan = planned(
            tiny_pair.recipe("small"),
            members={"small": tiny_pair.checkpoint("small")},
            precision=precision,
            options={"opset": opset},
            opset_limits=lambda options: (23, 23, "with attention=fused attention has to be one node"),
        )
        return plan.members[0].opset

    with pytest.raises(BadInput, match="option opset is 22, but with attention=fused") as caught:
        asked("fp16", 22)
    assert caught.value.hint == "leave it out, or --option opset=23"
    assert (asked("fp16", 23), asked("fp32", 22)) == (23, 22), "float32 has no such kernel"


def test_what_is_shipped_is_exported_anew_for_another() -> None:
    usual, other = planned("fashion", options={"opset": 20}), planned("fashion", options={"opset": "21"})
    assert all(plan.shipped is not None for plan in usual.members)
    assert [(plan.opset, plan.shipped) for plan in other.members] == [(21, None)] * 2


@pytest.mark.parametrize("opset", [20, 21, 22, 23])
def test_every_one_exports_what_pytorch_computes(tmp_path: Path, opset: int) -> None:
    """The export is checked against PyTorch when it is made; another opset is another export."""
    given = CHECKPOINTS["dit"]["published"](tmp_path)
    plan = network_plan("dit", given.path, given.options, "fp16").exported_at(opset)
    network = onnx_of(plan, tmp_path / "export")
    graph = onnx.load(graph_of(network, tmp_path / "export"))
    assert [(one.domain, one.version) for one in graph.opset_import] == [("", opset)]
    assert ("Attention" in {node.op_type for node in graph.graph.node}) == (opset == 23)


def test_a_build_for_any_backend_has_it(tiny_pair: TinyPair, tmp_path: Path) -> None:
    manifest = build(
        tiny_pair.recipe("small"),
        members={"small": tiny_pair.checkpoint("small")},
        output=tmp_path / "tiny.bundle",
        precision="fp16",
        profile=Range(1, 1, 2),
        options={"opset": "22"},
    )
    (part,) = manifest.members["small"].onnx
    assert onnx.load(tmp_path / "tiny.bundle" / part.path).opset_import[0].version == 22
