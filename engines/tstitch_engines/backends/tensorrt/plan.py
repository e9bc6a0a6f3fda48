"""Checks of a plan file that need neither the library nor a GPU, and what the library's own say in words."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Final

from tstitch_engines.backends.tensorrt.flavour import FLAVOURS, Flavour
from tstitch_engines.backends.tensorrt.options import DEFAULT_LIST
from tstitch_engines.backends.tensorrt.plan_header import HEADER_BYTES, PlanHeader, parse_plan_header
from tstitch_engines.bundle.manifest import EngineIdentity
from tstitch_engines.driver import fitting_cuda
from tstitch_engines.errors import BadEngine

__all__ = ["DIAGNOSES", "check_plan", "describe_plan", "map_plan", "rebuild"]

# EngineInvalidityDiagnostics -> what it means and what helps (`None`: build again). The plainest reason comes first:
# several may be given at once.
DIAGNOSES: Final[dict[str, tuple[str, str | None]]] = {
    "VERSION_MISMATCH": ("it was compiled by another version", None),
    "UNSUPPORTED_CC": ("it is for other GPUs", None),
    "OLD_CUDA_DRIVER": ("the NVIDIA driver is too old", "update the NVIDIA driver"),
    "OLD_CUDA_RUNTIME": ("the CUDA runtime is too old", "pip install -U cuda-core, or update CUDA"),
    "INSUFFICIENT_GPU_MEMORY": (
        "the GPU has too little memory",
        "build again with smaller sizes, --batch MIN:OPT:MAX, or use a larger GPU",
    ),
    "MALFORMED_ENGINE": ("the file is damaged", None),
    "CUDA_ERROR": ("CUDA does not start", "tstitch-trt doctor says what is missing"),
}


def rebuild(flavour: Flavour) -> str:
    return f"compile it again: tstitch-trt build BUNDLE --backend {flavour.name} --device cuda --fresh"


def check_plan(flavour: Flavour, version: str, path: Path, capability: tuple[int, int] | None) -> PlanHeader | None:
    """The header of a TensorRT-RTX plan. ``capability`` is the GPU's; ``None`` leaves that part out.

    Raises ``BadEngine`` for a file that is empty, cut short, or (TensorRT-RTX) of another version or for a list of GPUs
    without this one. What TensorRT's own plans hold is not documented: of those only the library can tell.
    """
    again = rebuild(flavour)

    def bad(what: str, hint: str = again) -> BadEngine:
        return BadEngine(f"the engine {path.name} {what}", hint=hint)

    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(HEADER_BYTES)
    except OSError as error:
        raise bad(f"can't be read: {error}") from None
    header = parse_plan_header(head)
    if not flavour.compiles_without_gpu:
        if header is not None:
            what = f"is a TensorRT-RTX {header.version} plan; wanted is one of {flavour.title}"
            raise bad(what, f"load it with --backend tensorrt-rtx, or {again}")
        if size < HEADER_BYTES:
            raise bad(f"has {size} bytes: truncated")
        return None
    if header is None:
        what = f"it has {size} bytes" if size < HEADER_BYTES else f"it starts with {head[:8]!r}"
        raise bad(f"is no {flavour.title} plan: {what}")
    if size != header.size:
        raise bad(f"has {size} bytes, its header says {header.size}: truncated or altered")
    if header.version != version:
        raise bad(
            f"was compiled by {flavour.title} {header.version}; installed is {version}, and a plan is for exactly one "
            "version",
            f"{again}; or pip install tensorrt-rtx-cu{fitting_cuda()}-libs=={header.version} "
            f"tensorrt-rtx-cu{fitting_cuda()}-bindings=={header.version}",
        )
    # A list with an open end is the library's own: what exactly is in it is the library's to say.
    if capability is not None and not header.later and not header.runs_on(capability):
        raise bad(f"is for GPUs of compute capability {header.gpus()}; this one has {capability[0]}.{capability[1]}")
    return header


def map_plan(flavour: Flavour, path: Path) -> mmap.mmap:
    """The plan as a buffer that is read from the file as it is used; it may be larger than the memory.

    Raises ``BadEngine`` for a file that can't be read. Nobody may cut the file short while the buffer lives: bundles
    and the cache replace files whole.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # mmap's word for an empty file
        raise BadEngine(f"the engine {path.name} can't be read: {error}", hint=rebuild(flavour)) from None


def describe_plan(identity: EngineIdentity, path: Path, again: str) -> str | None:
    """What the header of a plan says; ``None`` for TensorRT's own. ``again``: the command that compiles it again.

    Raises ``BadEngine`` for a file that is not whole, or is for other GPUs than ``identity`` names.
    """
    header = check_plan(FLAVOURS[identity.backend], identity.backend_version, path, None)
    if header is None:
        return None
    listed = ",".join(f"sm_{major}{minor}" for major, minor in header.capabilities)
    if identity.arch not in (DEFAULT_LIST, listed):
        raise BadEngine(f"the plan is for {listed}, the manifest says {identity.arch}", hint=again)
    return f"TensorRT-RTX {header.version}, compute capability {header.gpus()}"
