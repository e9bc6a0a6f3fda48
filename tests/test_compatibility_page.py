"""docs/support/compatibility.md is what the code says: ``make pages`` writes it."""

from __future__ import annotations

import re

import pytest

from support.compatibility.page import PAGE, diffusers_sections, model_sections, own_sections

diffusers = pytest.importorskip("diffusers")

# diffusers calls np.array on tensors, which NumPy 2 wants spelled otherwise
pytestmark = pytest.mark.filterwarnings("ignore")


def test_what_files_say() -> None:
    text = PAGE.read_text()
    for section in own_sections():
        assert section in text, "run make pages"


def test_what_diffusers_has() -> None:
    """Each key without effect here is tried in diffusers: one that changes its pictures fails, and not for the page."""
    compare(diffusers_sections())


@pytest.mark.slow
def test_keys_of_models() -> None:
    """A text encoder that computes something else than transformers with a key fails, and not for the page."""
    compare(model_sections())


def compare(sections: list[str]) -> None:
    text = PAGE.read_text()
    version = re.search(r"of diffusers (\S+)\.\n", text)
    assert version is not None
    if diffusers.__version__ != version[1]:
        pytest.skip(f"the page is of diffusers {version[1]}, this is {diffusers.__version__}")
    for section in sections:
        assert section in text, "run make pages"
