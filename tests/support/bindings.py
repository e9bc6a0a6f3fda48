"""The real Python bindings of any TensorRT version, imported without the libraries behind them.

TensorRT's own wheels fetch gigabytes from elsewhere; the bindings alone are one megabyte, and import when shared
objects of the right names define the few C functions that they link to. No object can be made with them, but every
class and method is there to look at.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

__all__ = ["Surface", "require_index", "surface", "unpacked"]

_UNREACHABLE = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|Network is unreachable|"
    r"Temporary failure in name resolution|Connection refused"
)
Surface = dict[str, list[str]]  # class -> its attributes; "" -> the names in the module

_LOOK = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
found = {"": dir(module)}
for name in dir(module):
    if isinstance(getattr(module, name), type):
        found[name] = dir(getattr(module, name))
print(json.dumps(found))
"""


def require_index(done: subprocess.CompletedProcess[str]) -> None:
    """Skips the test when pip did not reach the package index; any other failure of ``done`` is an error."""
    if done.returncode and _UNREACHABLE.search(done.stdout + done.stderr):
        pytest.skip("the package index can't be reached")
    assert done.returncode == 0, done.stdout + done.stderr


def unpacked(requirement: str, cache_dir: Path) -> Path:
    """The content of a wheel from the package index. Skips the test when the index can't be reached, and only then."""
    target = cache_dir / requirement.replace("==", "-")
    if not target.exists():
        wheels = cache_dir / "wheels"
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "1",
             "-d", wheels, requirement],
            capture_output=True,
            text=True,
        )  # fmt: skip
        require_index(done)
        stem = requirement.replace("==", "-").replace("-", "_").lower()
        (wheel,) = (w for w in wheels.iterdir() if w.name.replace("-", "_").lower().startswith(stem))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    return target


@cache
def surface(requirement: str, module: str, cache_dir: Path) -> Surface:
    """Everything that the bindings ``requirement`` define, read in a process of its own."""
    folder = unpacked(requirement, cache_dir)
    (binary,) = (folder / module).glob("*.so")
    stubs = folder / "stubs"
    stubs.mkdir(exist_ok=True)
    _write_stubs(binary, stubs)
    # The package imports this one first if it is there: not the real one of another version.
    (stubs / "tensorrt_rtx_libs.py").touch()
    done = subprocess.run(
        [sys.executable, "-P", "-c", _LOOK, module],
        env={**os.environ, "LD_LIBRARY_PATH": str(stubs), "PYTHONPATH": os.pathsep.join([str(stubs), str(folder)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: Surface = json.loads(done.stdout)
    return found


def _write_stubs(binary: Path, folder: Path) -> None:
    """A shared object for each library that ``binary`` wants of TensorRT, defining what it wants of them."""
    dynamic = subprocess.run(["readelf", "-d", binary], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"NEEDED.*\[(lib(?:nv|tensorrt)\S+)\]", dynamic)
    symbols = subprocess.run(["nm", "-D", "--undefined-only", binary], capture_output=True, text=True, check=True)
    names = re.findall(r"^\s+U ((?:create|get|init)[A-Z]\w*)$", symbols.stdout, re.MULTILINE)
    assert libraries, dynamic
    assert names, symbols.stdout
    source = folder / "stub.c"
    source.write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in names))
    for library in libraries:
        subprocess.run(
            ["gcc", "-shared", "-fPIC", source, "-o", folder / library, f"-Wl,-soname,{library}"], check=True
        )
