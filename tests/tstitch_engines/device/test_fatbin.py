"""Which of a fat binary's images a GPU and its driver run, as NVIDIA's rules of compatibility say."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from support.fatbins import MACHINE_CODE, PTX, pack_images
from support.nvidia_driver import OLD, install_driver
from tstitch_engines import _kernels, make_fatbin
from tstitch_engines.device import cuda_kernels
from tstitch_engines.device.fatbin import Image, image_for, read_images
from tstitch_engines.errors import Unavailable


@pytest.fixture
def fatbin(tmp_path: Path) -> Path:
    """Machine code for 7.5, 8.0 and 9.0 and PTX of 7.5, by CUDA 13.1."""
    path = tmp_path / "step_kernels.fatbin"
    path.write_bytes(
        pack_images(
            (MACHINE_CODE, (1, 8), 75), (MACHINE_CODE, (1, 8), 80), (MACHINE_CODE, (1, 8), 90), (PTX, (9, 1), 75)
        )
    )
    return path


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((7, 5), "7.5"),
        ((8, 0), "8.0"),
        ((8, 9), "8.0"),  # of the same major version, and older
        ((9, 0), "9.0"),
        ((11, 0), "PTX of 7.5"),
        ((12, 1), "PTX of 7.5"),
    ],
)
def test_what_a_gpu_runs(fatbin: Path, capability: tuple[int, int], runs: str) -> None:
    for driver in (None, (13, 1), (14, 0)):
        assert str(image_for(fatbin, capability, driver)) == runs


def test_what_no_image_is_for(fatbin: Path) -> None:
    with pytest.raises(
        Unavailable, match=r"no code for compute capability 7\.0 \(they have 7\.5, 8\.0, 9\.0, PTX of"
    ) as e:
        image_for(fatbin, (7, 0), None)
    assert f"make_fatbin --arch 70 --output {fatbin}" in e.value.hint


def test_ptx_of_a_newer_minor_version_is_not_compiled(fatbin: Path) -> None:
    with pytest.raises(Unavailable, match="no code for compute capability 12"):
        image_for(fatbin, (12, 0), (13, 0))
    assert image_for(fatbin, (9, 0), (13, 0)) == Image((9, 0), None)


def test_a_driver_for_an_older_release(fatbin: Path) -> None:
    with pytest.raises(
        Unavailable, match=r"compiled by CUDA 13; the NVIDIA driver runs CUDA 12\.4 and older"
    ) as caught:
        image_for(fatbin, (9, 0), (12, 4))
    assert "tstitch-trt[gpu-cu12]" in caught.value.hint
    assert f"make_fatbin --output {fatbin}" in caught.value.hint


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "k.fatbin"
    whole = pack_images((MACHINE_CODE, (1, 8), 75), (PTX, (8, 8), 75))
    path.write_bytes(whole)
    assert read_images(path) == (Image((7, 5), None), Image((7, 5), (12, 9)))
    for cut in (b"", whole[:10], whole[:-1], whole[:16], b"x" * 100, pack_images() + bytes(64)):
        path.write_bytes(cut)
        with pytest.raises(Unavailable, match="can't be read"):
            read_images(path)
    path.write_bytes(struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 64) + bytes(64))  # a part of no size
    with pytest.raises(Unavailable, match="a part of it is empty"):
        read_images(path)


@pytest.mark.skipif(not _kernels.HAS_FATBIN, reason="this build has no CUDA kernels")
def test_the_kernels_of_this_build(monkeypatch: pytest.MonkeyPatch, nvidia_driver: Path) -> None:
    path = cuda_kernels.fatbin_path()
    for arch in make_fatbin.ARCHITECTURES:
        assert image_for(path, divmod(arch, 10), None) == Image(divmod(arch, 10), None)
    for capability in ((8, 7), (10, 3), (12, 1), (15, 0)):
        image_for(path, capability, None)
    compiler = max(image.cuda for image in read_images(path) if image.cuda)
    if compiler >= (13, 0):  # before, the driver's own words came out of the first launch
        install_driver(monkeypatch, nvidia_driver, cuda=OLD)
        with pytest.raises(Unavailable, match=r"the NVIDIA driver runs CUDA 12\.4"):
            cuda_kernels.load_module((9, 0))
