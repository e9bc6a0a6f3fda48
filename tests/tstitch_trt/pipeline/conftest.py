"""One Stable Diffusion and one SDXL pair for all tests here; exports are shared through the session's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.diffusers_pipelines import sd_pipeline, sdxl_pipeline
from support.tiny_families import unet_folder


@pytest.fixture(scope="session")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipeline ``large`` and the bare UNet ``small``."""
    folder = tmp_path_factory.mktemp("sd")
    sd_pipeline(folder / "large")
    unet_folder(folder / "small", "least", part=None, seed=5)
    return folder


@pytest.fixture(scope="session")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of SDXL; ``small`` is pruned as SSD-1B."""
    folder = tmp_path_factory.mktemp("xl")
    sdxl_pipeline(folder / "large")
    unet_folder(folder / "small", "ssd1b", part=None, seed=len("ssd1b"))
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where accelerated pipelines keep their bundles."""
    return tmp_path_factory.mktemp("bundles")
