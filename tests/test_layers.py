"""The import rules: tstitch_trt -> tstitch_export -> tstitch_engines, never back; importing anything is light."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("tstitch_engines", "tstitch_export", "tstitch_trt")  # from the bottom up
HEAVY = ("torch", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_bindings", "tensorrt_rtx",
         "tensorrt_rtx_bindings", "cuda", "diffusers", "transformers", "tokenizers", "matplotlib", "PIL", "scipy",
         "safetensors")  # fmt: skip
# Written in torch from end to end, imported only inside functions of their neighbours (or run with `python -m`).
TORCH_MODULES = (
    "tstitch_export.families.dit.model",
    "tstitch_export.families.ldm.model",
    "tstitch_export.families.clip_text.model",
    "tstitch_export.families.vae.modules",
    "tstitch_export.families.unet.model",
    "tstitch_export.families.uvit.model",
    "tstitch_export.families.unet.upsampling",
    "tstitch_export.train.",
)


def modules() -> list[tuple[str, Path]]:
    found = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for root in spec.submodule_search_locations or []:
            for path in sorted(Path(root).rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                name = ".".join((package, *parts)).removesuffix(".__init__")
                found.append((name, path))
    assert len(found) > 30
    return found


def test_no_package_imports_one_above_it() -> None:
    for name, path in modules():
        rank = PACKAGES.index(name.split(".")[0])
        for node in ast.walk(ast.parse(path.read_text())):
            targets = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for target in targets:
                top = target.split(".")[0]
                if top in PACKAGES:
                    assert PACKAGES.index(top) <= rank, f"{name} imports {target}"


def test_importing_every_module_loads_nothing_heavy() -> None:
    """In a process where the heavy libraries can't be imported at all, as in a bare environment."""
    names = [
        name
        for name, _ in modules()
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
