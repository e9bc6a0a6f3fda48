"""The CUDA step kernels without nvcc: ``cuda_driver.cu`` compiled by NVRTC and packed by nvFatbin. No GPU is needed.

    python -m tstitch_engines.make_fatbin                     into the user's cache, where cuda_kernels finds it
    python -m tstitch_engines.make_fatbin --output FILE       anywhere else
    python make_fatbin.py --check                             whether that works here; CMake asks so

Needs ``cuda-bindings`` with NVIDIA's NVRTC and nvFatbin, all in the extras ``gpu`` and ``gpu-cu12``. Results are the
kernels that nvcc makes: same source, same names, same list of GPUs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from tstitch_engines.driver import fitting_extra
    from tstitch_engines.errors import BadInput, BuildFailed, TStitchError, Unavailable
else:  # CMake runs this file by itself: the package's requirements need not be installed to build it
    from driver import fitting_extra
    from errors import BadInput, BuildFailed, TStitchError, Unavailable

__all__ = ["ARCHITECTURES", "cached_fatbin", "main", "make_fatbin", "nvrtc_version", "source_folder"]

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)  # Turing, Ampere, Ada, Hopper, Blackwell; cuda.cmake reads this line
SOURCES = ("cuda_driver.cu", "dtypes.hpp", "step.hpp")


def _install() -> str:
    return f"pip install 'tstitch-trt[{fitting_extra('gpu')}]'"


def source_folder() -> Path:
    """Where the build installs the kernels' source: beside the extension module. Raises ``Unavailable``."""
    from tstitch_engines import _kernels

    folder = Path(str(_kernels.__file__)).with_name("src")
    if not folder.is_dir():
        raise Unavailable(f"the source of the CUDA step kernels is not at {folder}", hint="install tstitch-trt again")
    return folder


def cached_fatbin() -> Path:
    """Where ``main`` writes by default. The name has the hash of the source, so an older version's file is not used."""
    from tstitch_engines.bundle.cache import default_root

    digest = hashlib.sha256(b"\0".join(_read(source_folder()).values()))
    return default_root() / "kernels" / digest.hexdigest()[:16] / "step_kernels.fatbin"


def nvrtc_version() -> tuple[int, int]:
    """Raises ``Unavailable`` when cuda-bindings, NVRTC or nvFatbin is missing."""
    try:
        from cuda.bindings import nvfatbin, nvrtc

        nvfatbin.version()
        status, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise Unavailable(
            f"the CUDA step kernels can't be compiled without nvcc here: {' '.join(str(error).split())[:300]}",
            hint=_install(),
        ) from error
    if int(status) != 0:
        raise Unavailable(f"NVRTC does not answer: {status.name}", hint=_install())
    return int(major), int(minor)


def make_fatbin(source: Path, architectures: Iterable[int] = ARCHITECTURES) -> bytes:
    """Machine code for those of ``architectures`` (``90`` = sm_90) that NVRTC knows; PTX of the oldest and the newest.

    A driver compiles the newest PTX that is not newer than its GPU: that of the oldest is for those between them.

    Raises ``Unavailable`` (see ``nvrtc_version``), ``BadInput`` when NVRTC knows none of them, ``BuildFailed``.
    """
    nvrtc_version()
    from cuda.bindings import nvfatbin, nvrtc

    texts = _read(source)
    wanted = sorted(set(architectures))
    _, known = nvrtc.nvrtcGetSupportedArchs()
    chosen = [arch for arch in wanted if arch in known]
    if not chosen:
        raise BadInput(
            f"NVRTC knows none of the architectures {', '.join(map(str, wanted)) or '(none given)'}; "
            f"it knows {', '.join(map(str, known))}",
            hint="name some of those with --arch, or install another version of nvidia-cuda-nvrtc",
        )
    parts = [("CUBIN", arch) for arch in chosen] + [("PTX", arch) for arch in sorted({chosen[0], chosen[-1]})]
    with ThreadPool(min(len(parts), os.cpu_count() or 1)) as pool:  # of daemons, for which nothing waits after Ctrl-C
        compiled = list(pool.imap(lambda part: _compile(texts, *part), parts))  # raises the first error of the list
    handle = nvfatbin.create([], 0)
    try:
        for (kind, arch), code in zip(parts, compiled, strict=True):
            if kind == "CUBIN":
                nvfatbin.add_cubin(handle, code, len(code), str(arch), "step_kernels")
            else:
                nvfatbin.add_ptx(handle, code, len(code), str(arch), "step_kernels", "")
        packed = bytearray(nvfatbin.size(handle))
        nvfatbin.get(handle, packed)
    finally:
        nvfatbin.destroy(handle)
    return bytes(packed)


def _read(source: Path) -> dict[str, bytes]:
    return {name: (source / name).read_bytes() for name in SOURCES}


def _compile(texts: dict[str, bytes], kind: str, arch: int) -> bytes:
    """``kind``: ``"CUBIN"`` or ``"PTX"``."""
    from cuda.bindings import nvrtc

    target = f"{'sm' if kind == 'CUBIN' else 'compute'}_{arch}"
    main_file, *headers = SOURCES
    status, program = nvrtc.nvrtcCreateProgram(
        texts[main_file],
        main_file.encode(),
        len(headers),
        [texts[name] for name in headers],
        [name.encode() for name in headers],
    )
    _require(status, target)
    try:
        options = [f"--gpu-architecture={target}".encode(), b"--std=c++17"]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        _require(status, target, program)
        return _fetch(nvrtc, f"nvrtcGet{kind}", program, target)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _fetch(nvrtc: Any, what: str, program: Any, target: str) -> bytes:
    status, size = getattr(nvrtc, f"{what}Size")(program)
    _require(status, target)
    out: bytes = b" " * size  # cuda-bindings writes into it
    (status,) = getattr(nvrtc, what)(program, out)
    _require(status, target)
    return out


def _require(status: Any, target: str, program: Any = None) -> None:
    if int(status) == 0:
        return
    from cuda.bindings import nvrtc

    log = _fetch(nvrtc, "nvrtcGetProgramLog", program, target).rstrip(b"\0 \n") if program is not None else b""
    raise BuildFailed(
        f"NVRTC can't compile the step kernels for {target}: {status.name}\n{log.decode(errors='replace')}".rstrip(),
        hint=f"use another version of NVRTC: {_install()}",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tstitch_engines.make_fatbin", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: the user's cache")
    parser.add_argument("--source", type=Path, metavar="DIR", help="folder of cuda_driver.cu; default: as installed")
    parser.add_argument(
        "--arch", type=int, action="append", metavar="CC",
        help=f"a compute capability without the dot, repeatable; default: {' '.join(map(str, ARCHITECTURES))}",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="only say whether this works here")
    options = parser.parse_args(arguments)
    try:
        major, minor = nvrtc_version()
        if options.check:
            print(f"NVRTC {major}.{minor}")  # noqa: T201
            return 0
        source: Path = options.source or source_folder()
        output: Path = options.output or cached_fatbin()
        packed = make_fatbin(source, options.arch or ARCHITECTURES)
        _replace(output, packed)
    except (TStitchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code if isinstance(error, TStitchError) else 1
    print(f"{output}: {len(packed)} bytes", file=sys.stderr)  # noqa: T201
    return 0


def _replace(path: Path, content: bytes) -> None:
    """A reader sees all of it or nothing. Not ``bundle.files``, whose imports CMake's Python may lack."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
