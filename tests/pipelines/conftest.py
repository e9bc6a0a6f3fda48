"""One Stable Diffusion pair for all tests here; exports are shared through the session's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_families import unet_folder
from tiny_pipelines import pipeline_folder


@pytest.fixture(scope="session")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipeline ``large`` and the bare UNet ``small``."""
    folder = tmp_path_factory.mktemp("sd")
    pipeline_folder(folder / "large")
    unet_folder(folder / "small", "bksdm", part=None, seed=5)
    return folder


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipelines ``large`` (SDXL) and ``refiner`` and the bare UNet ``small`` (SSD-1B)."""
    folder = tmp_path_factory.mktemp("sdxl")
    pipeline_folder(folder / "large", "sdxl", solver="euler")
    pipeline_folder(folder / "refiner", "refiner", solver="euler", seed=6)
    unet_folder(folder / "small", "ssd1b", part=None, seed=5)
    return folder
