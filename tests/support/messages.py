"""The texts in the packages, which pages of the documentation quote."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

from test_layers import modules

__all__ = ["is_ours", "own_quotes"]

_OTHERS = r"\b(?:CUDA|TensorRT|ONNX Runtime): `"


@cache
def _texts() -> str:
    """All texts in the packages, one a line, with "…" for each value that is put in; and what a failed build says."""
    nodes = [node for path in modules().values() for node in ast.walk(ast.parse(path.read_text()))]
    plain = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    filled = [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        for node in nodes
        if isinstance(node, ast.JoinedStr)
    ]
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    build = project["tool"]["scikit-build"]["messages"]["after-failure"]
    return "\n".join([*plain, *filled, build])


def is_ours(words: str) -> bool:
    """Whether a text of the packages has these words in it; "…" stands for a value that is put in."""
    return words in _texts()


def own_quotes(cell: str) -> list[str]:
    """What a cell of a table quotes of our messages: all up to the first quote of another library."""
    ours = re.split(_OTHERS, cell)[0]
    return re.findall(r"`([^`]+)`", ours.removesuffix(" by `verify`"))
