"""docs/how-to/gpu.md: its options, figures and messages are those of the code and of CUDA."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from support.messages import is_ours, own_quotes
from tstitch_engines.backends.tensorrt.options import OPTIONS
from tstitch_engines.driver import DRIVERS
from tstitch_trt.verify.compare import LIMITS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "how-to" / "gpu.md").read_text()
FAILURES = PAGE.partition("## What failures mean")[2]


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```sh(?: title=\"[^\"]+\")?\n(.*?)```", text, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_options_and_extras_exist() -> None:
    named = set(re.findall(r"--option ([\w-]+)", PAGE)) | set(re.findall(r"`(attention|workspace|refit)=", PAGE))
    assert len(named) > 6
    assert named <= {*OPTIONS, "opset"}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = [name.strip() for text in re.findall(r'"\.\[([^\]]+)\]"', PAGE) for name in text.split(",")]
    assert {"gpu", "gpu-cu12", "rtx-cu12", "tensorrt-cu12"} <= set(installed) <= set(extras)
    for line in commands(PAGE):
        if "pip install" in line:  # one CUDA release at a time: they share their modules
            assert ("-cu12" in line) != bool(re.search(r"\b(gpu|rtx|tensorrt)[,\]]", line)), line


def test_figures_are_those_in_use() -> None:
    assert f"| {DRIVERS[13]} or newer | CUDA 13 and 12 |" in PAGE.replace("runs packages for ", "")
    assert f"| {DRIVERS[12]} to {DRIVERS[13] - 1} |" in PAGE
    for precision, (limit, _) in LIMITS.items():
        number = f"{limit:.0e}".replace("e-0", "e-")
        words = {"int8": "8 bits", "fp8": "8 bits"}.get(precision, precision)
        assert re.search(rf"{number} in (?:[\w ]+ and )?{words}", PAGE), (precision, number)


def test_messages_are_ours() -> None:
    cells = [line.split(" | ")[0] for line in FAILURES.splitlines() if line.startswith("| ")]
    quoted = [words for cell in cells for words in own_quotes(cell)]
    assert len(quoted) > 15
    assert [words for words in quoted if not is_ours(words)] == []


def test_cuda_says_so() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-core is not installed")
    said = re.findall(r"`([^`]+)` \((\d+)\)", FAILURES)
    assert len(said) >= 8
    for words, number in said:
        assert runtime.cudaGetErrorString(runtime.cudaError_t(int(number)))[1].decode().rstrip(".") == words


def test_the_readme_links_it() -> None:
    assert "(docs/how-to/gpu.md)" in (ROOT / "README.md").read_text()
