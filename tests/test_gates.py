"""What strangers' files pass through is called in one place each, so that nothing gets past its checks."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache

import pytest

from test_layers import modules


@cache
def calls() -> list[tuple[str, ast.Call, str]]:
    """All calls of the packages: module, node, and what is called."""
    return [
        (name, node, ast.unparse(node.func))
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def loads_engine(node: ast.Call, called: str) -> bool:
    """``Backend.load``, whatever the object is called: its keywords tell."""
    return called.endswith(".load") and {"member", "identity"} <= {keyword.arg for keyword in node.keywords}


GATES: dict[str, tuple[Callable[[ast.Call, str], bool], set[str]]] = {
    "engines are loaded": (loads_engine, {"tstitch_engines.compile.load"}),
    "engines that nobody has to vouch for, of ONNX Runtime and made by this process, are loaded": (
        lambda node, called: called == "load_own",
        {"tstitch_trt.quantise.trajectories", "tstitch_trt.verify.references"},
    ),
    "ONNX Runtime opens a file": (
        lambda node, called: called.endswith("InferenceSession"),
        {"tstitch_engines.backends.onnx_session"},
    ),
    "the library onnx opens a file: our own, or one that opening the bundle has checked": (
        lambda node, called: called.endswith("onnx.load"),
        {
            "tstitch_export.onnx_export.graph",
            "tstitch_export.onnx_export.weight_map",
            "tstitch_export.pack_pair",
            "tstitch_export.quantise.layers",
            "tstitch_export.quantise.quantise",
            "tstitch_export.quantise.worker",
            "tstitch_export.train.classifier",
            "tstitch_trt.reference.torch_module",
            "tstitch_trt.verify.layers",
        },
    ),
    "exported programs are loaded": (
        lambda node, called: called.endswith("export.load"),
        {"tstitch_engines.backends.torch_reference"},
    ),
    "pickles are read, weights only": (
        lambda node, called: called.endswith("torch.load"),
        {
            "tstitch_engines.backends.torch_archive",
            "tstitch_export.checkpoint.pickled",
            "tstitch_export.train.loop",
        },
    ),
    "objects are unpickled: a child reads what its parent wrote, over their own pipe": (
        lambda node, called: called in ("pickle.load", "pickle.loads", "marshal.load", "marshal.loads"),
        {"tstitch_export.onnx_export.in_child"},
    ),
    "code is made of text": (
        lambda node, called: called in ("eval", "exec", "compile"),
        {"tstitch_trt.cli._signals"},  # of an empty text
    ),
    "libraries are opened": (
        lambda node, called: called.endswith(("CDLL", "register_custom_ops_library", "load_library")),
        {
            "tstitch_engines.bundle.files",
            "tstitch_engines.child.serve",
            "tstitch_engines.driver",
            "tstitch_trt.serve.reload",
        },  # names in our code
    ),
}


@pytest.mark.parametrize("what", GATES)
def test_one_place(what: str) -> None:
    matches, places = GATES[what]
    assert {name for name, node, called in calls() if matches(node, called)} == places


def test_no_file_is_unpickled() -> None:
    for name, node, called in calls():
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert said.get("allow_pickle") != "True", name
        assert said.get("weights_only") != "False", name
        if called.endswith("torch.load"):
            assert said.get("weights_only") == "True", name
