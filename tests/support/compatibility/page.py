"""The page, and the command that writes or checks it."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from support.compatibility.checkpoints import checkpoint_section, training_section
from support.compatibility.inversions import inversion_section
from support.compatibility.loras import lora_section
from support.compatibility.models import model_section
from support.compatibility.pipelines import pipeline_section
from support.compatibility.schedulers import scheduler_section

__all__ = ["PAGE", "diffusers_sections", "main", "model_sections", "own_sections"]

PAGE: Final = Path(__file__).parents[3] / "docs" / "support" / "compatibility.md"
_HEAD: Final = """\
# Compatibility

What is honoured and what is refused, of all that pipelines, checkpoints and LoRAs may say. `make compatibility` writes
this page by asking the code that decides, and a test keeps both together. Nothing is ignored that would change a
picture: a row is either honoured, without effect in diffusers too, or refused with the reason given here.

Schedulers, pipelines and keys are those of diffusers {version}.
"""


def diffusers_sections() -> list[str]:
    """What depends on the version of diffusers."""
    return [pipeline_section(), scheduler_section()]


def model_sections() -> list[str]:
    """The same, and of transformers: models are made."""
    return [_in_folder(model_section)]


def own_sections() -> list[str]:
    return [_in_folder(section) for section in (lora_section, inversion_section, checkpoint_section, training_section)]


def _in_folder(section: Callable[[Path], str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return section(Path(folder))


def page() -> str:
    import diffusers

    head = _HEAD.format(version=diffusers.__version__)
    return "\n\n".join([head.strip(), *diffusers_sections(), *model_sections(), *own_sections()]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes docs/support/compatibility.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is not up to date")
    check = parser.parse_args().check
    text = page()
    if check and PAGE.read_text() != text:
        sys.stderr.write("docs/support/compatibility.md is not what the code says: run make compatibility\n")
        return 1
    if not check:
        PAGE.write_text(text)
    return 0
