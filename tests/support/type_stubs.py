"""TensorRT's type stubs, repaired where Python can't read them, and our protocols in their terms, for mypy.

``tensorrt-stubs`` was generated from the bindings of 10.13. Each repair is of that release and has to apply as often as
it says: another release fails here, loudly, until someone has looked at it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

__all__ = ["STUBS", "Check", "repair"]

STUBS: Final = "tensorrt_stubs==10.13.0.35.1"
_FILE: Final = "tensorrt_bindings/tensorrt.pyi"

# (what is there, what it becomes, how often, why)
_REPAIRS: Final = (
    (r"(?<=, )in: (?=list)", "in_: ", 4, "`in` is no name of a parameter"),
    (r"(?<=channel_axis: int)(?=\) -> IScaleLayer)", " = ...", 1, "a parameter without a default after some with one"),
    (r"^bool: DataType.*\n", "", 1, "hides the type bool, which the same file means in its signatures"),
    (
        r"(?<=: Dims)(?=[,)])",
        " | tuple[int, ...]",
        18,
        "pybind11 takes a sequence for a Dims, which the stubs don't say",
    ),
)
_CONFIG: Final = """[mypy]
strict = true
[mypy-tensorrt_bindings.*]
ignore_errors = true
[mypy-numpy.*]
follow_imports = skip
"""


def repair(stubs: Path, target: Path) -> Path:
    """Writes what Python can read of the package unpacked at ``stubs``; the file. Raises ``AssertionError``."""
    text = (stubs / _FILE).read_text()
    for pattern, put, count, why in _REPAIRS:
        text, found = re.subn(pattern, put, text, flags=re.MULTILINE)
        assert found == count, f"{STUBS}: {pattern!r} ({why}) is there {found} times, not {count}"
    ast.parse(text)
    file = target / _FILE
    file.parent.mkdir(parents=True)
    file.write_text(text)
    (file.parent / "__init__.pyi").touch()
    return file


@dataclass(frozen=True, kw_only=True)
class Check:
    """``stubs``: the repaired file. ``classes``: TensorRT's class -> our protocol of its objects. ``enums``: of itself.

    ``probed``: what may be missing.
    """

    stubs: Path
    classes: Mapping[str, str]
    enums: Mapping[str, str]
    probed: frozenset[str]

    def lacking(self, api: str) -> list[str]:
        """The probed names that the stubs don't have."""
        return self._translate(api)[1]

    def complaints(self, api: str) -> list[str]:
        """What mypy says when TensorRT's classes are taken for the protocols in ``api``, the source of our modules.

        Where a protocol names another one, TensorRT's own class is put: every call is held against its real signature,
        and what it gives against the protocol of that in turn.
        """
        folder = self.stubs.parent.parent
        source, _ = self._translate(api)
        (folder / "ours.py").write_text(source)
        (folder / "mypy.ini").write_text(_CONFIG)
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "mypy", "--no-error-summary",
             "ours.py"],
            cwd=folder,
            capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode in (0, 1), done.stdout + done.stderr
        assert not done.stderr, done.stderr
        return done.stdout.splitlines()

    def _translate(self, api: str) -> tuple[str, list[str]]:
        there = _surface(self.stubs)
        protocols = {node.name: node for node in ast.parse(api).body if isinstance(node, ast.ClassDef)}
        lacking = sorted(name for name in self.probed if not _has(there, name))
        lines = [
            "from __future__ import annotations",
            "from collections.abc import Mapping",
            "from typing import Any, Protocol",
            "import tensorrt_bindings.tensorrt as trt",
        ]
        theirs = _Theirs({ours: name for name, ours in self.classes.items() if name not in lacking})
        for name, ours in {**self.classes, **self.enums, "": "Library"}.items():
            if name in lacking:
                continue
            node = protocols[ours]
            node.body = [part for part in node.body if f"{name}.{_named(part)}".removeprefix(".") not in lacking]
            node.body = node.body or [ast.Pass()]
            if not name:  # a module's classes are no variables, and its version is not in this one
                node.body = [_as_property(part) for part in node.body if _named(part) != "__version__"]
            lines.append(ast.unparse(theirs.visit(node)))
            if name in self.classes:
                lines.append(f"def check_{name}(value: trt.{name}) -> {ours}: return value")
            else:
                lines.append(f"check_{name}: {ours} = trt{f'.{name}' if name else ''}")
        return "\n".join(lines) + "\n", lacking


class _Theirs(ast.NodeTransformer):
    """Puts TensorRT's classes for our protocols in annotations, and drops the module that ours come from."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self._names:
            return ast.Attribute(ast.Name("trt"), self._names[node.id])
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return ast.Name(node.attr) if ast.unparse(node.value) == "enums" else node


def _named(node: ast.stmt) -> str:
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.target)
    return getattr(node, "name", "")


def _as_property(node: ast.stmt) -> ast.stmt:
    if not isinstance(node, ast.AnnAssign):
        return node
    text = f"@property\ndef {ast.unparse(node.target)}(self) -> {ast.unparse(node.annotation)}: ..."
    return ast.parse(text).body[0]


def _surface(stubs: Path) -> dict[str, set[str]]:
    """Class -> its members, those of its bases too; "" -> the names in the module."""
    module: Any = ast.parse(stubs.read_text())
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}

    def members(node: ast.ClassDef) -> set[str]:
        own = {_named(part) for part in node.body}
        return own.union(*(members(classes[base.id]) for base in node.bases if isinstance(base, ast.Name)))

    return {"": {_named(node) for node in module.body}, **{name: members(node) for name, node in classes.items()}}


def _has(there: Mapping[str, set[str]], name: str) -> bool:
    owner, _, member = name.partition(".")
    return owner in there[""] and (not member or member in there[owner])
