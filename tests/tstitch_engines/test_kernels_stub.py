"""``_kernels.pyi`` declares what the compiled module has."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from tstitch_engines import _kernels

STUB = Path(__file__).parents[2] / "engines" / "tstitch_engines" / "_kernels.pyi"
TREE = ast.parse(STUB.read_text())


def functions() -> dict[str, tuple[ast.FunctionDef, Any]]:
    """Name -> its declaration, and the object."""
    found: dict[str, tuple[ast.FunctionDef, Any]] = {}
    for node in TREE.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node, getattr(_kernels, node.name)
        elif isinstance(node, ast.ClassDef):
            owner = getattr(_kernels, node.name)
            for part in node.body:
                assert isinstance(part, ast.FunctionDef)
                found[f"{node.name}.{part.name}"] = part, getattr(owner, part.name)
    return found


def test_the_names_are_those_of_the_module() -> None:
    declared = {ast.unparse(node.target) for node in TREE.body if isinstance(node, ast.AnnAssign)}
    declared |= {node.name for node in TREE.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert declared == {name for name in dir(_kernels) if not name.startswith("__")}
    methods = {name for name in dir(_kernels.Arena) if not name.startswith("_")} | {"__init__"}
    assert {f"Arena.{name}" for name in methods} == {name for name in functions() if "." in name}


@pytest.mark.parametrize("name", functions())
def test_the_parameters_are_those_of_the_module(name: str) -> None:
    """By the signatures that nanobind writes down."""
    declared, value = functions()[name]
    ((signature, _, defaults),) = value.__nb_signature__
    readable = re.sub(r"ndarray\[[^]]*\]", "ndarray", signature).replace("\\", "")  # \0, \1...: defaults, by number
    (real,) = ast.parse(f"{readable}: ...").body
    assert isinstance(real, ast.FunctionDef)
    if not real.args.posonlyargs:
        assert [arg.arg for arg in declared.args.args] == [arg.arg for arg in real.args.args]
    assert len(declared.args.posonlyargs) == len(real.args.posonlyargs)
    assert [ast.literal_eval(value) for value in declared.args.defaults] == list(defaults or ())
