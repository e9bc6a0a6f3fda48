"""From ONNX to a strongly typed network with one optimisation profile. Runs in the worker."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tstitch_engines.backends.tensorrt.api import Config, Network, NetworkBuilder, Parser
from tstitch_engines.backends.tensorrt.library import Session
from tstitch_engines.driver import fitting_extra
from tstitch_engines.errors import BuildFailed
from tstitch_engines.spec import ShapeProfile, TensorSpec

__all__ = ["DTYPES", "add_profile", "parse"]

# our names -> TensorRT's
DTYPES: Final = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "uint8": "UINT8",
    "bool": "BOOL",
}

# operator, or words of the message -> what is known to help
_WORKAROUNDS: Final = (
    ("Sequence", "export with torch.onnx.export(optimize=True), which leaves no sequence operators"),
    (
        "Attention",
        "use TensorRT 10.14 or newer, or build from the recipe or checkpoints with --option opset=22, where attention "
        "is MatMul and Softmax",
    ),
    ("IConcatenationLayer", "cast the inputs of torch.cat to one type before the export (SDXL's added embeddings)"),
    ("reshape changes volume", "remove squeeze() of a dimension that is not 1 before the export (PixArt)"),
    ("DeformConv", "TensorRT has no deformable convolution: build this member with --backend onnxruntime"),
)
_OTHERWISE: Final = "build this member with --backend onnxruntime, or express the operator by others in the model"


def parse(
    opened: Session, model: Path, family: str, expected: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]
) -> tuple[NetworkBuilder, Network, Parser]:
    """The network of ``model``; the parser holds its weights and must outlive the build.

    Raises ``BuildFailed`` naming the operators that can't be imported, or tensors that are not the ``expected`` inputs
    and outputs.
    """
    library = opened.library
    builder = library.Builder(opened.logger)
    # Always asked for: 10.x would else choose precisions of its own. It is bit 1 there and bit 0 elsewhere.
    flags = 1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    if network is None:
        raise BuildFailed(
            f"{opened} can't make a strongly typed network: {opened.messages.reason()}",
            hint=f"pip install -U 'tstitch-trt[{fitting_extra(opened.flavour.extra)}]'; supported is "
            f"{opened.flavour.versions}",
        )
    parser = library.OnnxParser(network, opened.logger)
    if not parser.parse_from_file(str(model)):
        raise _unsupported(opened, parser, model, family)
    for what, specs, count, get in (
        ("inputs", expected[0], network.num_inputs, network.get_input),
        ("outputs", expected[1], network.num_outputs, network.get_output),
    ):
        got = {tensor.name: (tensor.dtype, tuple(tensor.shape)) for tensor in map(get, range(count))}
        want = {
            spec.name: (
                getattr(library.DataType, DTYPES[spec.dtype]),
                tuple(size if isinstance(size, int) else -1 for size in spec.shape),
            )
            for spec in specs
        }
        if got != want:
            raise BuildFailed(
                f"{model.name} has the {what} {got}; wanted are {want}",
                hint="export the member again: a dimension that the exporter fixed can't be dynamic in an engine",
            )
    return builder, network, parser


def _unsupported(opened: Session, parser: Parser, model: Path, family: str) -> BuildFailed:
    found = [parser.get_error(index) for index in range(parser.num_errors)]
    places = [f"{operator} ({error.node_name()}): " if (operator := error.node_operator()) else "" for error in found]
    lines = dict.fromkeys(f"{place}{error.desc()}" for place, error in zip(places, found, strict=True))
    text = "; ".join(lines) or opened.messages.reason()
    hint = next((fix for words, fix in _WORKAROUNDS if words in text), _OTHERWISE)
    return BuildFailed(f"{opened} can't import {model.name} (family {family}): {text}", hint=hint)


def add_profile(
    opened: Session, builder: NetworkBuilder, config: Config, inputs: tuple[TensorSpec, ...], profile: ShapeProfile
) -> None:
    """Adds the member's only optimisation profile. Raises ``BuildFailed`` when the library refuses it."""
    made = builder.create_optimization_profile()
    if made is None:
        raise BuildFailed(f"{opened} makes no optimisation profile: {opened.messages.reason()}", hint="free memory")
    for spec in inputs:
        made.set_shape(spec.name, *profile.ends(spec))
    # `set_shape` says nothing when the sizes make no sense; the profile as a whole then is false.
    if not made or config.add_optimization_profile(made) < 0:
        sizes = ", ".join(f"{name} {size}" for name, size in profile.dims.items())
        raise BuildFailed(
            f"{opened} refuses the profile {sizes}: {opened.messages.reason()}",
            hint="choose smaller sizes: --batch MIN:OPT:MAX",
        )
