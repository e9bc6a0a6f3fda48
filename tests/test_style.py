"""Rules of style that no linter knows: options are typed records, not keywords read off a signature."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "tstitch_trt", ROOT / "export/tstitch_export", ROOT / "engines/tstitch_engines")

# What these read is the signature of somebody else's function: a diffusers pipeline's, a torch module's.
FOREIGN = {
    "tstitch_trt/pipeline/arguments.py",
    "tstitch_trt/pipeline/code_origin.py",
    "tstitch_trt/pipeline/scheduler.py",
    "export/tstitch_export/onnx_export/exporter.py",
}


def sources(*folders: Path) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def test_no_signature_is_read_as_a_schema() -> None:
    found = {
        name
        for name, tree in sources(*PACKAGES)
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in ("signature", "getfullargspec"))
        or (isinstance(node, ast.ImportFrom) and node.module == "inspect")
    }
    assert found <= FOREIGN


@pytest.mark.parametrize("folder", ["plan", "request", "runtime"])
def test_no_signature_has_an_untyped_dictionary(folder: str) -> None:
    found = []
    for name, tree in sources(ROOT / "tstitch_trt" / folder):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args
                every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
                annotations = [each.annotation for each in every if each is not None] + [node.returns]
                found += [
                    f"{name}:{node.lineno} {node.name}"
                    for annotation in annotations
                    if annotation is not None and "dict[str, Any]" in ast.unparse(annotation)
                ]
    assert not found
