"""What can be asked of the builder, checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from tstitch_engines.backends.tensorrt.api import Library, has
from tstitch_engines.backends.tensorrt.flavour import Flavour
from tstitch_engines.bundle.manifest import Option
from tstitch_engines.device.open import parse_device
from tstitch_engines.driver import fitting_cuda, fitting_extra
from tstitch_engines.errors import BadInput, Unavailable, unknown_name

__all__ = [
    "DEFAULT_LIST",
    "DEFAULT_WORD",
    "HARDWARE",
    "OPTIONS",
    "TILING",
    "VERBOSITY",
    "BuildOptions",
    "capabilities",
    "list_arch",
    "require_float8",
    "require_supported",
    "resolve",
]

OPTIONS: Final[Mapping[str, tuple[type, str]]] = {
    "workspace": (int, "memory limit of a single kernel in MiB (default: the library's)"),
    "optimisation-level": (int, "0 to 5, how long to look for fast kernels (default: the library's, 3)"),
    "tiling": (str, "none, fast, moderate or full: how long to look for tilings (default: none)"),
    "timing-cache": (str, "a file that keeps kernel timings for the next build"),
    "hardware-compatible": (str, "none, ampere+ or same (compute capability): other GPUs that run the engine"),
    "version-compatible": (bool, "the engine also runs on newer versions of the library (default: false)"),
    "refit": (bool, "the weights can be replaced later: LoRAs at run time (default: false)"),
    "strip-weights": (bool, "leave the weights out; they are read from the ONNX on loading (default: false)"),
    "weight-streaming": (bool, "keep half of the weights on the host; no graphs then (default: false)"),
    "compute-capabilities": (
        str,
        "the GPUs to compile for, e.g. 8.6,8.9,12.0, or default: the library's list (without it: that list, and with "
        "--device cuda that GPU)",
    ),
    "attention": (
        str,
        "attention in half precision: any (default), a fused kernel if there is one; fused, an error if there is none; "
        "apart, never fused, which is slower and helps to find a kernel that computes wrongly",
    ),
    "fp16-sums": (bool, "fp16 attention adds in float16: less exact, faster on GeForce (default: false, in float32)"),
    "tf32": (bool, "round the factors of float32 products to 11 bits, which is faster (default: false)"),
    "max-aux-streams": (int, "streams of its own that an engine may use (default: 0)"),
    "profiling-verbosity": (
        str,
        "none, names or detailed: how much an engine says about its layers; inspect --layers needs detailed "
        "(default: the library's, names)",
    ),
    "private-scratch": (bool, "activation memory of its own, to overlap members (default: false, shared)"),
}
# Options that change how the compiler finds what it makes, and not what that is.
UNRECORDED: Final = frozenset({"timing-cache"})
DEFAULT_WORD: Final = "default"  # the value of compute-capabilities that asks for the library's own list
DEFAULT_LIST: Final = "rtx-default"  # the architecture of a plan for the library's own list of GPUs

_SWITCHES: Final = ("fp16-sums", "version-compatible", "refit", "strip-weights", "weight-streaming", "tf32")
_LOSES_BIASES: Final = "11.3."  # named in the documentation of 11.3; nothing else than the version tells
_FLOAT8: Final = 89  # Ada; 75, 80 and 86 have no float8 products
# our words -> TensorRT's names
HARDWARE: Final = {"none": None, "ampere+": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}
_ATTENTION: Final = {"any": "any", "fused": "fused", "apart": "apart"}
VERBOSITY: Final = {"none": "NONE", "names": "LAYER_NAMES_ONLY", "detailed": "DETAILED"}
TILING: Final = {"none": "NONE", "fast": "FAST", "moderate": "MODERATE", "full": "FULL"}


class BuildOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``workspace`` in MiB. ``tiling``, ``hardware`` and ``verbosity`` are TensorRT's own names. ``None``: the
    library's default.

    ``capabilities`` as TensorRT-RTX has them, 86 for 8.6; empty for its default list.
    """

    workspace: int | None = None
    optimisation_level: int | None = None
    tiling: str | None = None
    timing_cache: str | None = None
    hardware: str | None = None
    attention: str = "any"
    fp16_sums: bool = False
    verbosity: str | None = None
    version_compatible: bool = False
    refit: bool = False
    strip_weights: bool = False
    weight_streaming: bool = False
    tf32: bool = False
    capabilities: tuple[int, ...] = ()
    max_aux_streams: int = 0


def resolve(flavour: Flavour, library: Library, options: Mapping[str, Option], device: str) -> BuildOptions:
    """Raises ``UnknownName`` for an option that does not exist and ``BadInput`` for one that can't be honoured."""
    for name in options:
        if name not in OPTIONS:
            raise unknown_name(f"{flavour.name} option", name, OPTIONS)
        if name in flavour.refused:
            raise BadInput(
                f"{flavour.title} can't honour the option {name}={options[name]}: {flavour.refused[name]}",
                hint=f"leave out --option {name}",
            )
    chosen = BuildOptions(
        workspace=_number(options, "workspace", 1, 1 << 24),
        optimisation_level=_number(options, "optimisation-level", 0, 5),
        tiling=_word(options, "tiling", TILING),
        timing_cache=str(Path(str(options["timing-cache"])).resolve()) if "timing-cache" in options else None,
        hardware=_word(options, "hardware-compatible", HARDWARE),
        attention=_word(options, "attention", _ATTENTION) or "any",
        verbosity=_word(options, "profiling-verbosity", VERBOSITY),
        **{name.replace("-", "_"): bool(options.get(name, False)) for name in _SWITCHES},
        capabilities=capabilities(flavour, library, options, device),
        max_aux_streams=_number(options, "max-aux-streams", 0, 64) or 0,
    )
    _require(flavour, library, chosen)
    if flavour.compiles_without_gpu and (chosen.refit or chosen.strip_weights):
        name = "refit" if chosen.refit else "strip-weights"
        count = len(chosen.capabilities)
        if parse_device(device)[0] != "cuda" or count != 1:
            got = "its default list of GPUs" if count == 0 else f"{count} compute capabilities"
            raise BadInput(
                f"{flavour.title} can compile with {name} only on a GPU and for exactly one compute capability; "
                f"asked for is --device {device} and {got}",
                hint=f"on a machine with the GPU: --device cuda --option {name}=true; or leave out {name}",
            )
    return chosen


def capabilities(flavour: Flavour, library: Library, options: Mapping[str, Option], device: str) -> tuple[int, ...]:
    """What a TensorRT-RTX plan is to be for: the option, else the GPU ``device``, else (empty) the library's list.

    Raises ``Unavailable`` for a GPU ``device`` that the library does not support, and ``UnknownName`` for any other
    compute capability that it does not know.
    """
    if not flavour.compiles_without_gpu:
        return ()
    kind, index = parse_device(device)
    own = ""
    if kind == "cuda" and "compute-capabilities" not in options:
        from tstitch_engines.device.cuda import compute_capability

        own = "{}.{}".format(*compute_capability(index))
    text = str(options.get("compute-capabilities", own or DEFAULT_WORD))
    if text == DEFAULT_WORD:
        return ()
    known = _known(library)
    found = []
    for word in (word.strip() for word in text.split(",")):
        if word not in known:
            if kind == "cuda":
                require_supported(flavour, library, device)
            raise unknown_name(
                f"compute capability of {flavour.title} {library.__version__}",
                word,
                known,
                hint="(separate several by commas: --option compute-capabilities=8.6,8.9)",
            )
        found.append(known[word])
    return tuple(sorted(set(found)))


def require_supported(flavour: Flavour, library: Library, device: str) -> None:
    """Raises ``Unavailable`` for a GPU that TensorRT-RTX does not know: to compile again does not help there."""
    from tstitch_engines.device.cuda import compute_capability, gpu_and_driver

    known, (_, index) = _known(library), parse_device(device)
    own = "{}.{}".format(*compute_capability(index))
    if own not in known:
        raise Unavailable(
            f"{flavour.title} {library.__version__} does not support {device} ({gpu_and_driver(index)[0]}, compute "
            f"capability {own}); it supports {', '.join(known)}",
            hint="use --backend tensorrt or onnxruntime on this GPU, or another GPU; a plan for the library's default "
            f"list can be tried, which may be refused on loading: --option compute-capabilities={DEFAULT_WORD}",
        )


def _known(library: Library) -> dict[str, int]:
    """``8.6`` -> 86, of all compute capabilities that TensorRT-RTX can compile for."""
    names = [name for name in library.ComputeCapability.__members__ if name.startswith("SM")]
    return {f"{int(name[2:]) // 10}.{int(name[2:]) % 10}": int(name[2:]) for name in names}


def list_arch(found: tuple[int, ...]) -> str:
    """The architecture that an identity states for these: ``sm_86,sm_89``."""
    return ",".join(f"sm_{number}" for number in found) or DEFAULT_LIST


def require_float8(flavour: Flavour, arch: str) -> None:
    """Raises ``BadInput`` unless every GPU that ``arch`` stands for computes in float8: compute capability 8.9 and up.

    TensorRT-RTX's default list goes down to 8.0 or 7.5. It compiles, and the older GPUs could not run the plan.
    """
    numbers = [] if arch == DEFAULT_LIST else [int(name.removeprefix("sm_")) for name in arch.split(",")]
    old = [f"{number // 10}.{number % 10}" for number in numbers if number < _FLOAT8]
    if numbers and not old:
        return
    got = f"compute capability {', '.join(old)}" if old else "the library's default list of GPUs, older ones among them"
    fix = (
        "leave them out: --option compute-capabilities=8.9,12.0" if flavour.compiles_without_gpu else "use a newer GPU"
    )
    raise BadInput(
        f"an fp8 member needs compute capability 8.9 or newer, and {flavour.title} is to compile it for {got}",
        hint=f"{fix}; or quantise to int8, which every GPU runs: tstitch-trt quantise BUNDLE --mode int8",
    )


def _require(flavour: Flavour, library: Library, options: BuildOptions) -> None:
    """Refuses what this version of the library does not have, or does wrong."""
    lacking = None
    if options.tiling is not None and not has(library, "IBuilderConfig.tiling_optimization_level"):
        lacking = "tiling"
    if options.hardware == "SAME_COMPUTE_CAPABILITY" and not has(
        library, "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY"
    ):
        lacking = "hardware-compatible=same"
    if options.attention == "fused" and not has(library, "IAttention"):
        lacking = "attention=fused"
    if lacking:
        raise BadInput(
            f"{flavour.title} {library.__version__} has no {lacking}",
            hint=f"leave it out, or pip install -U 'tstitch-trt[{fitting_extra(flavour.extra)}]'",
        )
    if options.refit and library.__version__.startswith(_LOSES_BIASES):
        raise BadInput(
            f"{flavour.title} {library.__version__} may drop the bias of a matrix product from an engine that is built "
            "with refit (a known issue of 11.3), so its pictures could be wrong",
            hint=f"pip install 'tensorrt-cu{fitting_cuda()}!=11.3.*,>=10.13,<12', or leave out --option refit; "
            "strip-weights alone is not affected",
        )


def _number(options: Mapping[str, Option], name: str, low: int, high: int) -> int | None:
    value = options.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadInput(
            f"option {name} is {value!r}; allowed is a whole number from {low} to {high}",
            hint=f"write it as --option {name}={min(max(low, 1), high)}",
        )
    return value


def _word(options: Mapping[str, Option], name: str, known: Mapping[str, str | None]) -> str | None:
    value = options.get(name)
    if value is None:
        return None
    if value not in known:
        raise unknown_name(f"value of option {name}", str(value), known)
    return known[str(value)]
