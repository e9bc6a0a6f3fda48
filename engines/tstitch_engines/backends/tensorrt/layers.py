"""The layers that a plan is made of, and what they tell about its speed.

Two sources, which name things alike: the log of a TensorRT-RTX build in detailed verbosity, which needs no GPU, and the
engine inspector's JSON of a loaded plan, whose fields differ between TensorRT 10.x and 11.x. Layers are called by what
the compiler's names say; those are not documented and were read from TensorRT-RTX 1.7 and published TensorRT 10 lists.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from tstitch_engines.bundle.decode import convert
from tstitch_engines.bundle.read import decode_json, read_bounded
from tstitch_engines.errors import BadEngine

__all__ = [
    "LOG_HEADING",
    "Kind",
    "Layer",
    "LayerSummary",
    "LayerTensor",
    "PlanLayers",
    "layers_file",
    "of_log",
    "parse_inspector",
    "parse_log",
    "read_layers",
    "summarise",
    "suspicions",
    "write_layers",
]

Kind = Literal["gemm", "convolution", "attention", "softmax", "copy", "pointwise", "setup", "unknown"]

LOG_HEADING: Final = "Layers:\n"  # how the message of the build log starts that lists them
_BYTES: Final = 32 << 20  # of a file: ten times what the list of SDXL's UNet would take
_Layers = msgspec.Meta(max_length=20_000)
_MANY_COPIES: Final = 6  # from one attention to the next; DiTs need two, UNets five

# The compiler's abbreviations of operators that move or retype data and compute nothing.
_MOVES: Final = frozenset({"Cast", "Conc", "Copy", "Expa", "Move", "Pad", "Repl", "Resh", "Slic", "Spli", "Tran"})
_PRODUCTS: Final = frozenset({"Fc", "Gemm", "Matm"})
_SOFTMAX: Final = ({"Exp", "Sum", "Div"}, {"Soft"})
_EIGHT_BITS: Final = ("int8", "fp8")
_COPY_TYPES: Final = ("reformat", "shuffle", "copy", "cast", "slice", "concat", "transpose")
_SETUP_TYPES: Final = ("shape", "noop", "constant", "host", "signal", "wait")
# The words for a number type, in an order in which none is part of an earlier one.
_DTYPES: Final = (
    ("BF(?:loat)?16", "bf16"), ("FP8|E4M3", "fp8"), ("FP4|E2M1", "fp4"), ("UInt8", "uint8"), ("Int8", "int8"),
    ("Int4", "int4"), ("Int64", "int64"), ("Int32", "int32"), ("Bool", "bool"), ("Half|FP16|Float16", "fp16"),
    ("Float|FP32", "fp32"),
)  # fmt: skip


class LayerTensor(msgspec.Struct, frozen=True):
    """``dtype`` as in precisions: fp32, fp16, bf16, int8, fp8, int64...; ``?`` where the source does not say it."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()  # -1 where it is dynamic


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """``type`` and ``kernel`` in the library's own words. ``nodes``: of the ONNX graph. ``constants``: its weights."""

    name: str
    type: str = ""
    kernel: str = ""
    inputs: tuple[LayerTensor, ...] = ()
    constants: tuple[LayerTensor, ...] = ()
    outputs: tuple[LayerTensor, ...] = ()
    nodes: tuple[str, ...] = ()
    stream: int = 0

    @property
    def kind(self) -> Kind:
        return _kind(self)

    @property
    def precision(self) -> str:
        """The type of its first operand; of a product the wider one's, which the other is widened to."""
        operands = [one.dtype for one in (*self.inputs, *self.constants)]
        if self.kind == "gemm":
            operands = sorted(operands[:2], key=_EIGHT_BITS.__contains__)
        return operands[0] if operands else "?"


class PlanLayers(msgspec.Struct, frozen=True, kw_only=True):
    """The layers of one plan in their order. ``source``: who listed them; ``library``: its name and version."""

    schema: Literal[1] = 1
    source: Literal["build log", "engine inspector"]
    library: str
    layers: Annotated[tuple[Layer, ...], _Layers]


class LayerSummary(msgspec.Struct, frozen=True, kw_only=True):
    """``count`` of the layers; ``kinds``: of each kind; ``products`` and ``attention`` (fused): by precision;
    ``streams`` they run on.

    ``passes``: kernels over the activations beside products and attention, ``copies``: those of them that compute
    nothing, both the mean from one attention, fused or not, to the next; ``None`` for less than two of them.
    """

    count: int
    kinds: dict[str, int]
    products: dict[str, int]
    attention: dict[str, int]
    passes: float | None
    copies: float | None
    streams: int


# --- what a layer is


def _operators(name: str) -> list[str]:
    """``__myl_MulAddResh_myl0_7`` -> Mul, Add, Resh: what a generated kernel does, in four letters each."""
    found = re.match(r"__myl_([A-Za-z0-9]+?)(?:_myl\d+_\d+|_0x[0-9a-f]+)?$", name)
    return re.findall(r"[A-Z][a-z0-9]*", found[1]) if found else []


def _kind(layer: Layer) -> Kind:
    words, kind = f"{layer.name} {layer.kernel}".lower(), layer.type.lower()
    operators = set(_operators(layer.name)) or set(_operators(layer.kernel))
    if re.search(r"mha|flash|fused_attention", words):
        return "attention"
    if kind.startswith(_SETUP_TYPES) or _is_setup(layer):
        return "setup"
    if "conv" in kind or kind == "correlation":
        return "convolution"
    if "gemm" in kind or "matrixmultiply" in kind or "fullyconnected" in kind or operators & _PRODUCTS:
        return "gemm"
    if kind.startswith("softmax") or any(wanted <= operators for wanted in _SOFTMAX):
        return "softmax"
    if kind.startswith(_COPY_TYPES) or (operators and operators <= _MOVES):
        return "copy"
    return "pointwise" if kind else "unknown"


def _is_setup(layer: Layer) -> bool:
    """Whether it writes sizes and counters only, from nothing or from each other."""
    written = layer.outputs
    return bool(written) and all(one.dtype in ("int32", "int64") and len(one.shape) < 2 for one in written)


def summarise(layers: Sequence[Layer]) -> LayerSummary:
    kinds = [layer.kind for layer in layers]

    def by_precision(kind: Kind) -> dict[str, int]:
        return dict(Counter(layer.precision for layer in layers if layer.kind == kind).most_common())

    ends = [index for index, kind in enumerate(kinds) if kind in ("attention", "softmax")]
    between = Counter(kinds[ends[0] : ends[-1]]) if len(ends) > 1 else None
    return LayerSummary(
        count=len(layers),
        kinds=dict(Counter(kinds).most_common()),
        products=by_precision("gemm"),
        attention=by_precision("attention"),
        passes=None if between is None else (between["copy"] + between["pointwise"]) / (len(ends) - 1),
        copies=None if between is None else between["copy"] / (len(ends) - 1),
        streams=len({layer.stream for layer in layers}),
    )


def suspicions(layers: Sequence[Layer], precision: str) -> tuple[str, ...]:
    """What may cost time in a plan of a network in ``precision``, one sentence each."""
    found, summary = [], summarise(layers)
    apart = summary.kinds.get("softmax", 0)
    if precision != "fp32" and apart:
        found.append(f"attention is not fused in {apart} places: its products and softmax run one after another")
    if precision in _EIGHT_BITS:
        if any(layer.type for layer in layers) and precision not in summary.products:  # names alone tell no types
            found.append(f"no matrix product is in 8 bits, though the network is {precision}")
        if widened := sum(_widens(layer) for layer in layers):
            found.append(f"{widened} layers widen 8-bit weights on every call, for products in more bits")
    if summary.copies is not None and summary.copies > _MANY_COPIES:
        found.append(f"{summary.copies:.1f} layers from one attention to the next only move or retype numbers")
    return tuple(found)


def _widens(layer: Layer) -> bool:
    return (
        layer.kind != "gemm"
        and any(one.dtype in _EIGHT_BITS for one in layer.constants)
        and not any(one.dtype in _EIGHT_BITS for one in layer.outputs)
    )


# --- from the library's words


def _dtype(words: str) -> str:
    return next((dtype for pattern, dtype in _DTYPES if re.search(pattern, words, re.IGNORECASE)), "?")


def parse_log(message: str) -> tuple[Layer, ...]:
    """The layers of the log message that starts with ``LOG_HEADING``. Raises ``ValueError`` for one in another form."""
    lines = message.removeprefix(LOG_HEADING).partition("\n\n")[0].splitlines()
    return tuple(_of_line(line) for line in lines if line.strip())


_LINE: Final = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<kernel>.*?), StreamId: (?P<stream>\d+), Metadata: (?P<nodes>.*)$"
)
_TENSOR: Final = re.compile(r"\{ Name: (.*?), Dimensions: \[([-\d,]*)\].*?, Datatype: (\w+),")
_NODE: Final = re.compile(r"\[ONNX Layer: (.*?)\]")


def _of_line(line: str) -> Layer:
    found = _LINE.match(line)
    if found is None:
        raise ValueError(f"a layer in another form: {line[:200]}")

    def tensors(text: str) -> tuple[LayerTensor, ...]:
        return tuple(
            LayerTensor(name, _dtype(kind), tuple(int(size) for size in shape.split(",") if size))
            for name, shape, kind in _TENSOR.findall(text)
        )

    return Layer(
        name=found["name"],
        type=found["type"],
        kernel=found["kernel"],
        inputs=tensors(found["inputs"]),
        constants=tensors(found["constants"]),
        outputs=tensors(found["outputs"]),
        nodes=tuple(_NODE.findall(found["nodes"])),
        stream=int(found["stream"]),
    )


def parse_inspector(text: str) -> tuple[Layer, ...]:
    """The layers in ``IEngineInspector::getEngineInformation``'s JSON, of TensorRT 10.x or 11.x.

    A plan that was built with names only has names only. Raises ``ValueError`` for JSON without layers, or in another
    form.
    """
    document = json.loads(text)
    found = document.get("Layers") if isinstance(document, dict) else None
    if not isinstance(found, list):
        raise ValueError(f"no list of layers: {text[:200]}")
    try:
        return tuple(Layer(name=one) if isinstance(one, str) else _of_record(one) for one in found)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"a layer in another form: {error}") from error


def _of_record(record: Mapping[str, Any]) -> Layer:
    def tensors(name: str) -> tuple[LayerTensor, ...]:
        # 10.x says type and format in one field, 11.x in two
        return tuple(
            LayerTensor(
                str(one.get("Name", "")),
                _dtype(str(one.get("Datatype", one.get("Format/Datatype", "")))),
                tuple(one.get("Dimensions", ())),
            )
            for one in record.get(name) or ()
        )

    weights = record.get("Weights")  # of TensorRT's own layers; those of its compiler have constants
    stored = (LayerTensor("Weights", _dtype(str(weights.get("Type", "")))),) if isinstance(weights, dict) else ()
    return Layer(
        name=str(record.get("Name", "")),
        type=str(record.get("LayerType", "")),
        kernel=str(record.get("TacticName", "")),
        inputs=tensors("Inputs"),
        constants=tensors("Constants") or stored,
        outputs=tensors("Outputs"),
        nodes=tuple(_NODE.findall(str(record.get("Metadata", "")))),
        stream=int(record.get("StreamId", 0)),
    )


def of_log(message: str, library: str) -> PlanLayers:
    """Raises what ``parse_log`` does."""
    return PlanLayers(source="build log", library=library, layers=parse_log(message))


# --- the file beside a plan


def layers_file(plan: Path) -> Path:
    return plan.with_name(f"{plan.name}.layers.json")


def write_layers(plan: Path, found: PlanLayers) -> Path:
    """Writes the file beside ``plan``. Raises ``OSError``."""
    path = layers_file(plan)
    path.write_bytes(msgspec.json.encode(found))
    return path


def read_layers(plan: Path, others: Iterable[str], *, again: str) -> PlanLayers | None:
    """The list beside ``plan``, where it is one of its ``others``, the names of the engine's other files.

    ``again``: the command that makes it anew. Raises ``BadEngine`` for a file that is damaged.
    """
    path = layers_file(plan)
    if path.name not in others:
        return None
    try:
        return convert(decode_json(read_bounded(path, _BYTES)), PlanLayers, word="field")
    except (OSError, ValueError) as error:
        raise BadEngine(
            f"the list of layers {path.name} can't be read: {error}",
            hint=f"compile the engine again: {again}",
        ) from error
