"""The CUDA step kernels by NVRTC: the same kernels for the same GPUs as nvcc's, found where they are put."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tstitch_engines import _kernels, make_fatbin
from tstitch_engines.device import cuda_kernels
from tstitch_engines.errors import BadInput, BuildFailed, Unavailable

MAGIC = 0xBA55ED50
PTX, ELF = 1, 2


def entries(fatbin: bytes) -> Iterator[tuple[int, int]]:
    """(kind, architecture) of each part: a header of 16 bytes, then parts that begin with their sizes."""
    magic, _, header, size = struct.unpack_from("<IHHQ", fatbin)
    assert (magic, header + size) == (MAGIC, len(fatbin))
    at = header
    while at < len(fatbin):
        kind, _, part_header, part = struct.unpack_from("<HHIQ", fatbin, at)
        yield kind, struct.unpack_from("<I", fatbin, at + 28)[0]
        at += part_header + part


def kernel_names() -> set[str]:
    """From the source itself: plain kernels, and those that the macros make for each type."""
    text = (make_fatbin.source_folder() / "cuda_driver.cu").read_text()
    plain = set(re.findall(r'extern "C" __global__ void (\w+)\(', text))
    types = re.findall(r"^TSTITCH_KERNELS\((\w+),", text, re.MULTILINE)
    parts = [f"{part}_{one}" for one in types for part in ("advance", "guidance_factor")]
    prepares = [f"prepare_{one}_{time}" for one in types for time in ("float32", "int64")]
    return {name for name in plain if not name.endswith("_")} | {*parts, *prepares}


@pytest.fixture
def nvrtc() -> None:
    try:
        make_fatbin.nvrtc_version()
    except Unavailable as error:
        pytest.skip(error.message)


@pytest.mark.usefixtures("nvrtc")
def test_machine_code_and_ptx_of_every_kernel(tmp_path: Path) -> None:
    """Two of the architectures, to be quick; the whole list is compared with cuobjdump when a build makes it."""
    assert make_fatbin.main(["--output", str(tmp_path / "k.fatbin"), "--arch", "90", "--arch", "75"]) == 0
    packed = (tmp_path / "k.fatbin").read_bytes()
    assert sorted(entries(packed)) == [(PTX, 75), (PTX, 90), (ELF, 75), (ELF, 90)]
    assert {name.decode() for name in re.findall(rb"\.text\.(\w+)", packed)} == kernel_names()


@pytest.mark.usefixtures("nvrtc")
def test_no_kernel_spills_registers() -> None:
    """On the GPU that leaves least room of those listed, as the compiler's log has it."""
    from cuda.bindings import nvrtc

    main, *headers = ((make_fatbin.source_folder() / name).read_bytes() for name in make_fatbin.SOURCES)
    names = [name.encode() for name in make_fatbin.SOURCES]
    _, program = nvrtc.nvrtcCreateProgram(main, names[0], len(headers), headers, names[1:])
    options = [b"--gpu-architecture=sm_120", b"--std=c++17", b"--ptxas-options=-v"]
    assert int(nvrtc.nvrtcCompileProgram(program, len(options), options)[0]) == 0
    log = b" " * nvrtc.nvrtcGetProgramLogSize(program)[1]
    nvrtc.nvrtcGetProgramLog(program, log)
    spills = re.findall(rb"(\d+) bytes spill stores", log)
    assert len(spills) == len(kernel_names())
    assert set(spills) == {b"0"}


@pytest.mark.usefixtures("nvrtc")
def test_every_architecture_is_known_to_nvrtc() -> None:
    from cuda.bindings import nvrtc

    assert set(make_fatbin.ARCHITECTURES) <= set(nvrtc.nvrtcGetSupportedArchs()[1])


@pytest.mark.skipif(not _kernels.HAS_FATBIN, reason="this build has no CUDA kernels")
def test_the_build_made_the_whole_list() -> None:
    found = list(entries(cuda_kernels.fatbin_path().read_bytes()))
    assert {arch for kind, arch in found if kind == ELF} == set(make_fatbin.ARCHITECTURES)
    ptx = sorted(arch for kind, arch in found if kind == PTX)
    assert ptx == [min(make_fatbin.ARCHITECTURES), max(make_fatbin.ARCHITECTURES)]


@pytest.mark.skipif(not _kernels.HAS_FATBIN, reason="this build has no CUDA kernels")
@pytest.mark.parametrize("capability", [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121, 130])
def test_every_gpu_from_turing_on_finds_an_image(capability: int) -> None:
    """Machine code runs on GPUs of its major version that are not older, PTX on every GPU that is not older."""
    found = entries(cuda_kernels.fatbin_path().read_bytes())
    fits = [arch <= capability and (kind == PTX or arch // 10 == capability // 10) for kind, arch in found]
    assert any(fits)


@pytest.mark.usefixtures("nvrtc")
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match=r"knows none of the architectures 12; it knows .*75, "):
        make_fatbin.make_fatbin(make_fatbin.source_folder(), [12])
    for name in make_fatbin.SOURCES:
        (tmp_path / name).write_bytes((make_fatbin.source_folder() / name).read_bytes())
    with (tmp_path / "cuda_driver.cu").open("a") as source:
        source.write("no such thing;\n")
    with pytest.raises(BuildFailed, match=r'for sm_90: .*COMPILATION\n(.|\n)*identifier "no" is undefined'):
        make_fatbin.make_fatbin(tmp_path, [90])
    assert make_fatbin.main(["--source", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert make_fatbin.main(["--check"]) == 2
    text = capsys.readouterr().err
    assert "can't be compiled without nvcc here" in text
    assert "tstitch-trt[gpu]" in text


def test_cmake_runs_the_file_by_itself() -> None:
    """In a build environment the package's own requirements are missing: -S leaves out site-packages."""
    script = Path(make_fatbin.__file__)
    done = subprocess.run([sys.executable, "-S", str(script), "--check"], capture_output=True, text=True)
    assert (done.returncode, "hint: pip install" in done.stderr) == (2, True), done.stderr


def test_a_build_without_kernels_uses_those_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(make_fatbin.source_folder(), tmp_path / "src")
    monkeypatch.setattr(_kernels, "__file__", str(tmp_path / "_kernels.so"))
    monkeypatch.setenv("TSTITCH_TRT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(Unavailable, match="neither nvcc nor NVRTC") as caught:
        cuda_kernels.find_fatbin()
    assert "python -m tstitch_engines.make_fatbin" in caught.value.hint
    made = make_fatbin.cached_fatbin()
    made.parent.mkdir(parents=True)
    made.write_bytes(b"kernels")
    assert cuda_kernels.find_fatbin() == made
    with (tmp_path / "src" / "step.hpp").open("a") as source:
        source.write("// another version\n")
    with pytest.raises(Unavailable):  # kernels of another version's source
        cuda_kernels.find_fatbin()
