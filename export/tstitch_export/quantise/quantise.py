"""8-bit members: Q/DQ nodes around the products of a denoiser's blocks, calibrated on inputs that the caller gives.

    int8   symmetric, one scale per output channel of a weight and one per activation
    fp8    float8 e4m3fn, scaled the same way; compute capability 8.9 or newer

Everything else is computed in ``high_precision``. Inputs and outputs of the graph are float32.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Member
from tstitch_engines.child import DEFAULT, Job, Limits, run_in_child
from tstitch_engines.errors import BadInput, BuildFailed, Unavailable, unknown_name
from tstitch_engines.needs import require
from tstitch_engines.spec import TensorSpec
from tstitch_export.onnx_export.graph import tidy, validate
from tstitch_export.quantise.layers import Layer, choose, find_layers, is_quantised, prepare
from tstitch_export.quantise.worker import Request
from tstitch_export.quantise.worker import quantise as quantise_here

__all__ = [
    "HIGH_PRECISIONS",
    "METHODS",
    "MODES",
    "QuantisedGraph",
    "check_method",
    "check_quantisable",
    "float32_specs",
    "need_modelopt",
    "quantise_graph",
]

_log = logging.getLogger(__name__)

MODES: Final = ("int8", "fp8")
METHODS: Final = ("max", "entropy")
HIGH_PRECISIONS: Final = ("fp16", "bf16", "fp32")
_SOURCES: Final = ("fp32", "fp16")
_BATCH: Final = 8  # calibration rows per call
_MODULES: Final = ("modelopt", "lief", "onnx_graphsurgeon", "onnxslim")  # what its ONNX part imports beyond our extras
_SECONDS: Final = 7200.0  # the limit of one graph unless another is given
_INSTALL: Final = 'pip install "tstitch-trt[cpu,quant]"'


@dataclass(frozen=True)
class QuantisedGraph:
    """What ``quantise_graph`` wrote: ``files[0]`` is the graph, the other, if any, its weights."""

    files: tuple[Path, ...]
    quantised: tuple[Layer, ...]
    kept: tuple[Layer, ...]  # that could be quantised and were named to be kept
    high: tuple[Layer, ...]  # that never are: embedders, modulation, first and last layer, convolutions


def need_modelopt() -> None:
    """Raises ``Unavailable`` unless nvidia-modelopt and what its ONNX part needs is installed. Imports none of it."""
    require("onnx", "quantising a member", extra="quant")
    missing = [name for name in _MODULES if find_spec(name) is None]
    if missing:
        raise Unavailable(
            f"quantising needs nvidia-modelopt with its ONNX part; not installed: {', '.join(missing)}", hint=_INSTALL
        )


def check_method(mode: str, method: str, high_precision: str) -> None:
    """Raises ``UnknownName``, and ``BadInput`` for a method that the mode does not have."""
    for what, value, known in (
        ("quantisation mode", mode, MODES),
        ("calibration method", method, METHODS),
        ("high precision", high_precision, HIGH_PRECISIONS),
    ):
        if value not in known:
            more = "(int4 is not offered: no engine builder takes it for these models)" if value == "int4" else None
            raise unknown_name(what, value, known, hint=more)
    if mode == "fp8" and method != "max":
        raise BadInput(
            f"calibration {method!r} is for int8: float8 has no equal steps whose range it could choose; allowed with "
            "fp8 is max",
            hint="leave --calibration out",
        )


def check_quantisable(name: str, member: Member, model: Path) -> None:
    """Raises ``BadInput`` when the member is quantised already or of a precision that is no source."""
    if member.precision in MODES or is_quantised(model):
        raise BadInput(
            f"member {name!r} is quantised already ({member.precision}); allowed are members in {', '.join(_SOURCES)}",
            hint="quantise the bundle it was made from, which is unchanged",
        )
    if member.precision not in _SOURCES:
        raise BadInput(
            f"member {name!r} is {member.precision}; allowed are members in {', '.join(_SOURCES)}",
            hint=f"build the bundle with --precision {name}=fp32 and quantise that; --high-precision "
            f"{member.precision} chooses what the other layers compute in",
        )


def float32_specs(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The inputs or outputs of a quantised member: every floating-point tensor is float32."""
    return tuple(
        msgspec.structs.replace(spec, dtype="float32") if spec.dtype in ("float16", "bfloat16") else spec
        for spec in specs
    )


def quantise_graph(
    model: Path,
    output: Path,
    *,
    member: Member,
    mode: str,
    calibration: Mapping[str, NDArray[Any]],
    method: str = "max",
    high_precision: str = "fp16",
    keep: Sequence[str] = (),
    limits: Limits = DEFAULT,
) -> QuantisedGraph:
    """Writes ``model``, the graph of ``member``, to ``output`` with Q/DQ nodes.

    ``calibration``: float32 and int64 arrays of real inputs by name, ``[N, ...]`` each. ``method``: an activation's
    range is its largest magnitude (``max``) or loses the least information (``entropy``, int8). ``keep``: layers to
    leave in high precision, by name or pattern. ``limits``: of the child process that does it.

    Raises ``BadInput``, ``Unavailable`` without modelopt, ``BuildFailed`` when modelopt fails or its graph is not as
    asked for. Nothing is left then.
    """
    check_method(mode, method, high_precision)
    need_modelopt()
    onnx = require("onnx", "quantising a member", extra="quant")
    rows = {name: len(values) for name, values in calibration.items()}
    wanted = {spec.name for spec in member.inputs}
    if set(rows) != wanted or len(set(rows.values())) != 1 or min(rows.values()) < 1:
        raise BadInput(
            f"the calibration has the rows {rows}; wanted is one equal number for each of {', '.join(sorted(wanted))}",
            hint="record them from trajectories: tstitch-trt quantise does",
        )
    made = [output, output.with_name(f"{output.name}_data")]
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".quantise-") as name:
            folder = Path(name)
            plain = folder / "plain.onnx"
            external = prepare(model, plain, precision=member.precision)
            layers = find_layers(plain)
            chosen, kept = choose(layers, keep)
            np.savez(folder / "calibration.npz", allow_pickle=False, **dict(calibration))
            request = Request(
                model=str(plain.absolute()),
                output=str(output.absolute()),
                mode=mode,
                calibration=str((folder / "calibration.npz").absolute()),
                batch=min(_BATCH, *rows.values()),
                method=method,
                high_precision=high_precision,
                nodes=tuple(layer.node for layer in chosen),
                external=external,
            )
            _run(request, folder, limits)
        inputs, outputs = float32_specs(member.inputs), float32_specs(member.outputs)
        tidy(output, inputs=inputs, outputs=outputs)
        graph = onnx.load(output, load_external_data=False).graph
        _check_nodes(graph, {layer.node for layer in chosen}, mode)
        validate(output, inputs=inputs, outputs=outputs)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    _log.info(
        "%s: %d layers in %s, %d in %s", output.name, len(chosen), mode, len(layers) - len(chosen), high_precision
    )
    return QuantisedGraph(
        files=tuple(path for path in made if path.exists()),
        quantised=tuple(chosen),
        kept=tuple(kept),
        high=tuple(layer for layer in layers if layer.place != "inside"),
    )


def _check_nodes(graph: Any, wanted: set[str], mode: str) -> None:
    """Raises ``BuildFailed`` unless exactly the nodes ``wanted`` read both of their operands from 8 bits."""
    makers = {output: node for node in graph.node for output in node.output}

    def eight_bit(name: str) -> bool:
        # between the weight and its node there may be a change of shape or type
        node = makers.get(name)
        while node is not None and node.op_type in ("Transpose", "Reshape", "Cast"):
            node = makers.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "Cast"):
            continue
        operands = [eight_bit(name) for name in node.input]
        if node.name in wanted and not all(operands[:2]):
            raise _not_as_asked(f"the layer {node.name} was left out of {mode}")
        if node.name not in wanted and any(operands):
            raise _not_as_asked(f"{node.op_type} {node.name} reads {mode} and was to stay as it is")
    present = {node.name for node in graph.node}
    if missing := sorted(wanted - present):
        raise _not_as_asked(f"the layers {', '.join(missing)} are gone")


def _not_as_asked(what: str) -> BuildFailed:
    return BuildFailed(
        f"nvidia-modelopt's graph is not what was asked for: {what}",
        hint='pip install "nvidia-modelopt==0.47.0", the version this was made for; or report this message',
    )


def _run(request: Request, folder: Path, limits: Limits) -> None:
    """Quantises in a child process, whose temporary files are made in ``folder``."""
    job = Job(
        what="the process that quantises",
        seconds=_SECONDS,
        limits=limits,
        error=BuildFailed,
        if_killed="free memory, or quantise on a machine with more and copy the bundle; fewer --samples need less",
        if_crashed="report this message with tstitch-trt doctor",
        kept=False,
        temporary=folder,
        environment={"PYTHONHASHSEED": "0"},  # modelopt iterates over sets
    )
    reply = run_in_child(quantise_here, request, job)
    if reply.missing:
        raise Unavailable(f"nvidia-modelopt does not start: {reply.error}", hint=_INSTALL)
    if reply.error:
        raise BuildFailed(
            f"nvidia-modelopt failed on {Path(request.model).name}: {reply.error}",
            hint="free space there, or write to another file system with -o"
            if "No space left" in reply.error
            else "leave the layer it names in high precision: --keep LAYER; or report this message",
        )
    if not Path(request.output).is_file():
        raise _not_as_asked("it wrote nothing")
