"""The import rules: the order of packages and of the folders in each, no circle, and importing anything is light."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGES = ("tstitch_engines", "tstitch_export", "tstitch_trt")  # from the bottom up

# A folder or file imports only what stands on a line before its own, and files of its own folder.
ORDER = {
    "tstitch_engines": [
        ["errors", "progress", "quiet", "version"],
        ["checks", "closing"],
        ["driver", "threads"],
        ["child", "needs", "spec"],
        ["bundle", "trace"],
        ["make_fatbin"],
        ["device"],
        ["backends"],
        ["compile", "host_call"],
        ["__init__"],
    ],
    "tstitch_export": [
        ["checkpoint"],
        ["hub"],
        ["families"],
        ["planning"],
        ["onnx_export"],
        ["quantise", "build"],
        ["pack_pair", "train"],
        ["__init__"],
    ],
    "tstitch_trt": [
        ["files", "progress", "start"],
        ["solvers", "images"],
        ["plan"],
        ["request"],
        ["runtime"],
        ["pipeline", "serve", "study", "reference"],
        ["verify", "quantise", "bench", "doctor", "demo"],
        ["plots"],
        ["report", "ui"],
        ["__init__"],
        ["cli"],
    ],
}
# Who may import the exporter, and only inside functions: it needs torch.
EXPORTS = (
    "tstitch_trt.pipeline.", "tstitch_trt.reference.", "tstitch_trt.quantise.", "tstitch_trt.verify.",
    "tstitch_trt.runtime.lora", "tstitch_trt.cli.",
)  # fmt: skip

HEAVY = ("torch", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_bindings", "tensorrt_rtx",
         "tensorrt_rtx_bindings", "cuda", "diffusers", "transformers", "tokenizers", "matplotlib", "PIL", "scipy",
         "safetensors", "fastapi", "starlette", "uvicorn", "ray", "prometheus_client", "opentelemetry",
         "huggingface_hub")  # fmt: skip
# Written in torch from end to end, imported only inside functions of their neighbours (or run with `python -m`).
TORCH_MODULES = (
    "tstitch_export.families.dit.model",
    "tstitch_export.families.ldm.model",
    "tstitch_export.families.clip_text.model",
    "tstitch_export.families.vae.modules",
    "tstitch_export.families.unet.model",
    "tstitch_export.families.assemble",
    "tstitch_export.families.uvit.model",
    "tstitch_export.train.",
)


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for root in spec.submodule_search_locations or []:
            for path in sorted(Path(root).rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                name = ".".join((package, *parts)).removesuffix(".__init__")
                found[name] = path
    assert len(found) > 30
    return found


def imports(name: str, source: str) -> Iterator[tuple[str, bool]]:
    """Our modules that ``source`` imports anywhere in it, and whether in a function or for types only."""
    tree = ast.parse(source)
    inside: set[int] = set()
    for node in ast.walk(tree):
        types_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if types_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative import"
            base = node.module or ""
            names = [a.name for a in node.names if f"{base}.{a.name}" != "tstitch_engines._kernels"]  # compiled
            targets = [f"{base}.{n}" if f"{base}.{n}" in modules() else base for n in names]
        else:
            continue
        for target in targets:
            if target.split(".")[0] in PACKAGES and target != name:
                yield target, id(node) in inside


@cache
def graph() -> dict[str, frozenset[str]]:
    return {name: frozenset(t for t, _ in imports(name, path.read_text())) for name, path in modules().items()}


def place(name: str) -> tuple[int, int, str]:
    """Package, line and folder of a module."""
    package, _, rest = name.partition(".")
    folder = rest.split(".")[0] or "__init__"
    for line, folders in enumerate(ORDER[package]):
        if folder in folders:
            return PACKAGES.index(package), line, folder
    raise AssertionError(f"{name}: {folder} has no line in ORDER")


def upward(name: str, target: str) -> bool:
    mine, other = place(name), place(target)
    return other > mine if mine[0] != other[0] else mine[2] != other[2] and other[1] >= mine[1]


def test_no_module_imports_one_on_its_own_line_or_above() -> None:
    wrong = [f"{name} imports {t}" for name, targets in graph().items() for t in sorted(targets) if upward(name, t)]
    assert not wrong, "\n".join(wrong)


def test_an_upward_import_is_seen() -> None:
    lazy = "def f() -> None:\n    from tstitch_trt.study.records import Evaluation\n"
    typed = "if TYPE_CHECKING:\n    from tstitch_trt.runtime.runtime import Runtime\n"
    for name, source in (("tstitch_trt.runtime.stepper", lazy), ("tstitch_trt.plan.plan", typed)):
        assert [upward(name, target) for target, _ in imports(name, source)] == [True]
    assert upward("tstitch_engines.bundle.cache", "tstitch_engines.device.base")
    assert upward("tstitch_trt.study.store", "tstitch_trt.pipeline.kinds"), "the same line"
    assert not upward("tstitch_trt.study.store", "tstitch_trt.study.records"), "the same folder"


def test_the_exporter_is_imported_in_functions_only() -> None:
    for name, path in modules().items():
        if not name.startswith("tstitch_trt"):
            continue
        for target, inside in imports(name, path.read_text()):
            if target.startswith("tstitch_export"):
                assert inside, f"{name} imports {target} at its top"
                assert name.startswith(EXPORTS), f"{name} imports {target}"


def test_no_circle() -> None:
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for target in sorted(graph()[name]):
            visit(target)
        path.pop()
        done.add(name)

    for name in graph():
        visit(name)


def test_importing_every_module_loads_nothing_heavy() -> None:
    """In a process where the heavy libraries can't be imported at all, as in a bare environment."""
    names = [
        name
        for name in modules()
        if not any(name == m or name.startswith(m) for m in TORCH_MODULES) and name != "tstitch_export.train"
    ]
    script = f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ImportError("heavy library " + name)
sys.meta_path.insert(0, Refuse())
for name in {names!r}:
    if not name.endswith("__main__"):
        importlib.import_module(name)
loaded = [m for m in {HEAVY!r} if m in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_exist(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_the_runtime_has_no_bases() -> None:
    """It holds its parts."""
    runtime = importlib.import_module("tstitch_trt.runtime.runtime").Runtime
    assert runtime.__mro__ == (runtime, object)
