"""The page docs/support/compatibility.md."""

from __future__ import annotations

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

__all__ = ["PAGE", "diffusers_sections", "model_sections", "own_sections", "page"]

PAGE: Final = Path(__file__).parents[3] / "docs" / "support" / "compatibility.md"
_HEAD: Final = """\
# Compatibility

What diffusers pipelines, schedulers, checkpoints and LoRAs may contain, and whether it is honoured or refused.

Nothing that would change a picture is ignored: an entry is honoured, or it has no effect in diffusers either, or it is
refused for the reason given here. `make pages` writes this page by asking the code that decides; the tests
compare the two.

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
