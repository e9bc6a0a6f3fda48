"""Text bundles made by hand: members whose ONNX graphs are a few nodes, each with its oracle in numpy.

    model_output = tanh(sample / 2 + every conditioning input, projected) + sin(timestep / 200) / 10

Every input has a weight of its own, so that one that is missing, swapped or of another image shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.bundle import Bundle, write_bundle
from tstitch_engines.bundle.files import hash_file
from tstitch_engines.bundle.manifest import (
    Component,
    Conditioning,
    Decoder,
    Defaults,
    Latent,
    Manifest,
    Member,
    Network,
    NoiseScheduleSpec,
)
from tstitch_engines.child import DEFAULT, Limits
from tstitch_engines.compile.bundle import recompile
from tstitch_engines.spec import Range, TensorSpec

__all__ = ["CHANNELS", "Made", "component", "graph", "made_member", "text_bundle"]

CHANNELS = 4
Array = NDArray[np.float64]
_FLOATS = {"fp32": "float32", "fp16": "float16"}


class Made:
    """A network, its graph and what it computes."""

    def __init__(self, network: Network, model: Any, weights: Mapping[str, Array]) -> None:
        self.network = network
        self.model = model
        self.weights = weights

    def __call__(self, sample: Array, t: float, given: Mapping[str, Array]) -> Array:
        """The member's output in float64 for ``sample [B,C,H,W]`` and one row per image of every other input."""
        total = sample / 2
        for name, weight in self.weights.items():
            value = np.asarray(given[name], np.float64)
            if name == "encoder_hidden_states":  # weighted along the tokens: their order counts
                places = np.arange(1, value.shape[1] + 1) / value.shape[1]
                value = (value * places[:, None]).mean(axis=1)
            if name in ("inpaint", "control"):
                total = total + np.einsum("bchw,cd->bdhw", value, weight)
            elif value.ndim == 4:
                total = total + value.mean(axis=(2, 3), keepdims=True) * weight
            else:
                total = total + (value @ weight)[:, :, None, None]
        return np.tanh(total) + np.sin(t / 200) / 10


def made_member(
    name: str, *, inputs: Mapping[str, tuple[int | str, ...]], precision: str = "fp32", **fields: Any
) -> Made:
    """A member with dynamic ``H``, ``W`` and those further ``inputs``: name -> shape after the batch."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(sum(name.encode()))
    kind = _FLOATS[precision]
    proto = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[kind]
    plain = ("time_ids",)  # always float32
    specs = [
        TensorSpec(name="sample", dtype=kind, shape=("B", CHANNELS, "H", "W")),
        TensorSpec(name="timestep", dtype="float32", shape=("B",)),
        *(
            TensorSpec(name=key, dtype="float32" if key in plain else kind, shape=("B", *shape))
            for key, shape in inputs.items()
        ),
    ]
    out = TensorSpec(name="model_output", dtype=kind, shape=("B", CHANNELS, "H", "W"))
    nodes: list[Any] = []
    constants: dict[str, NDArray[Any]] = {
        "half": np.float32(0.5), "tenth": np.float32(0.1), "scale": np.float32(1 / 200),
        "column": np.array([-1, 1, 1, 1]), "map": np.array([-1, CHANNELS, 1, 1]), "one": np.array([1]),
        "two_three": np.array([2, 3]), "zero": np.int64(0), "step": np.int64(1), "first": np.int64(1),
        "row": np.array([1, -1, 1]),
    }  # fmt: skip
    weights: dict[str, Array] = {}

    def node(kind_: str, inputs_: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind_, inputs_, [output], **attributes))
        return output

    def wide(value: str) -> str:
        return node("Cast", [value], f"{value}.wide", to=TensorProto.FLOAT)

    total = node("Mul", [wide("sample"), "half"], "total.0")
    for index, (key, shape) in enumerate(inputs.items()):
        value = wide(key)
        if key == "encoder_hidden_states":
            node("Shape", [value], f"{key}.shape")
            tokens = node("Gather", [f"{key}.shape", "first"], f"{key}.tokens", axis=0)
            after = node("Add", [tokens, "step"], f"{key}.after")
            places = node("Range", ["first", after, "step"], f"{key}.range")
            share = node(
                "Div",
                [
                    node("Cast", [places], f"{key}.places", to=TensorProto.FLOAT),
                    node("Cast", [tokens], f"{key}.count", to=TensorProto.FLOAT),
                ],
                f"{key}.share",
            )
            weighted = node("Mul", [value, node("Reshape", [share, "row"], f"{key}.row")], f"{key}.weighted")
            value = node("ReduceMean", [weighted, "one"], f"{key}.mean", keepdims=0)
        if key in ("inpaint", "control"):
            weights[key] = rng.normal(size=(int(shape[0]), CHANNELS)) / 4
            constants[f"{key}.w"] = weights[key].T[:, :, None, None].astype(np.float32)
            term = node("Conv", [value, f"{key}.w"], f"{key}.term")
        elif len(shape) == 3:
            weights[key] = rng.normal(size=(1, CHANNELS, 1, 1))
            constants[f"{key}.w"] = weights[key].astype(np.float32)
            mean = node("ReduceMean", [value, "two_three"], f"{key}.mean", keepdims=1)
            term = node("Mul", [mean, f"{key}.w"], f"{key}.term")
        else:
            size = 0.002 if key == "time_ids" else 0.5  # pixels are large numbers
            weights[key] = size * rng.normal(size=(int(shape[-1]), CHANNELS)) / np.sqrt(int(shape[-1]))
            constants[f"{key}.w"] = weights[key].astype(np.float32)
            product = node("MatMul", [value, f"{key}.w"], f"{key}.product")
            term = node("Reshape", [product, "map"], f"{key}.term")
        total = node("Add", [total, term], f"total.{index + 1}")
    time = node("Sin", [node("Mul", ["timestep", "scale"], "t.scaled")], "t.sin")
    time = node("Reshape", [node("Mul", [time, "tenth"], "t.tenth"), "column"], "t.column")
    summed = node("Add", [node("Tanh", [total], "tanh"), time], "summed")
    node("Cast", [summed], "model_output", to=proto)
    network = Member(
        family="hand-made",
        parametrisation=fields.pop("parametrisation", "eps"),
        precision=precision,  # type: ignore[arg-type]
        learned_variance=False,
        inputs=tuple(specs),
        outputs=(out,),
        onnx=(),
        sources=(),
        check=None,
        config={},
        multiples={"H": 2, "W": 2},
        **fields,
    )
    initialisers = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    return Made(network, graph(network, nodes, initialisers), weights)


def graph(network: Network, nodes: list[Any], initialisers: list[Any]) -> Any:
    """The nodes as a model with the tensors of ``network``; constants that no node reads are left out."""
    from onnx import TensorProto, helper

    kinds = {
        "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64,
    }  # fmt: skip

    def value(spec: TensorSpec) -> Any:
        dims = [d if isinstance(d, int) or d.isalpha() else None for d in spec.shape]
        return helper.make_tensor_value_info(spec.name, kinds[spec.dtype], dims)

    read = {name for node in nodes for name in node.input}
    made = helper.make_graph(
        nodes,
        network.family,
        [value(spec) for spec in network.inputs],
        [value(spec) for spec in network.outputs],
        [tensor for tensor in initialisers if tensor.name in read],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def text_bundle(
    output: Path,
    members: Mapping[str, Made],
    *,
    parts: Mapping[str, Made] | None = None,
    files: Mapping[str, Mapping[str, Path]] | None = None,
    batch: Range | None = None,
    sides: Range | None = None,
    tokens: Range | None = None,
    limits: Limits = DEFAULT,
    **fields: Any,
) -> Bundle:
    """Writes the bundle and compiles its engines. ``files``: of the parts, by purpose."""
    made = {**members, **(parts or {})}

    def fill(staging: Path) -> Manifest:
        networks: dict[str, Any] = {}
        for name, one in made.items():
            path = staging / name / "model.onnx"
            path.parent.mkdir()
            path.write_bytes(one.model.SerializeToString())
            more = {key: component(staging, name, file) for key, file in (files or {}).get(name, {}).items()}
            fresh = {"onnx": (_described(staging, path),), "files": more}
            networks[name] = type(one.network)(
                **{field: getattr(one.network, field) for field in one.network.__struct_fields__} | fresh
            )
        return Manifest(
            **{
                "schema": 1,
                "name": "hand-made",
                "recipe": "hand-made",
                "versions": {},
                "latent": Latent(channels=CHANNELS, height=8, width=8),
                "noise": NoiseScheduleSpec(kind="scaled-linear", beta_start=0.00085, beta_end=0.012),
                "conditioning": Conditioning(kind="text"),
                "defaults": Defaults(steps=6, schedule=":0.5,".join(members)),
                "decoder": Decoder(kind="none", factor=8),
                "members": {name: networks[name] for name in members},
                "parts": {name: networks[name] for name in parts or {}},
                **fields,
            }
        )

    bundle = write_bundle(output, fill)
    dims = {spec_dim for one in made.values() for spec in one.network.inputs for spec_dim in spec.dims}
    ranges = {"B": batch or Range(1, 2, 4), "H": sides or Range(4, 8, 16), "W": sides or Range(4, 8, 16)}
    ranges |= {"T": tokens or Range(1, 5, 12)}
    return recompile(
        bundle, backend="onnxruntime", profile={k: r for k, r in ranges.items() if k in dims}, limits=limits
    )


def component(staging: Path, folder: str, source: Path) -> Component:
    """Copies a file into a folder of the bundle at ``staging``."""
    path = staging / folder / source.name
    path.write_bytes(source.read_bytes())
    return _described(staging, path)


def _described(staging: Path, path: Path) -> Component:
    sha256, size = hash_file(path)
    return Component(path=str(path.relative_to(staging)), sha256=sha256, bytes=size)
