"""What is asked of the builder for attention: a fused kernel, its sums in float32, or products and softmax apart.

Seen in the code of plans that TensorRT-RTX 1.5 to 1.7 compiles (nothing of this was run on a GPU):

- An Attention node (ONNX opset 23) in half precision becomes one fused kernel or, where there is none, an error;
  ``decomposable`` allows other kernels then, and changes nothing where there is one.
- In float16 that kernel adds in float16, in a DiT in both of its products. With query, key and value cast to float32
  around the node it is the same kernel with float32 sums, and no other kernel is added (from 1.7; TensorRT's notes name
  11.3); before, the cast is an error. In bfloat16 tensor cores add in float32 anyway.
- Products and softmax (up to opset 22) are fused as well, in float16 with all sums in float16. Subtracting the largest
  value before the softmax, which changes nothing in it, keeps them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from tstitch_engines.backends.tensorrt.api import (
    Attention,
    AttentionOutput,
    Layer,
    Library,
    Network,
    Softmax,
    Tensor,
    has,
)
from tstitch_engines.backends.tensorrt.library import Session
from tstitch_engines.backends.tensorrt.options import BuildOptions
from tstitch_engines.errors import BuildFailed

__all__ = ["Settled", "lacks_kernel", "settle_attention"]

# Words of the error where there is no fused kernel: its own, and those of any node without one, of which TensorRT names
# the part of the graph it would be in and not always the operator (NVIDIA/TensorRT issue 4739)
_NO_KERNEL: Final = ("not supported by a dedicated kernel", "find any implementation")
_FUSED_HEADS: Final = (16, 256)  # head sizes with a fused kernel in half precision, in steps of 8


class Settled(NamedTuple):
    """How many attentions of a network are settled how.

    ``fused``: a fused kernel is required, ``widened`` of them with sums in float32. ``loose``: in half precision, and
    left to the builder. ``apart``: kept from being fused. Those in float32, which no kernel fuses, are not counted.
    """

    fused: int = 0
    widened: int = 0
    loose: int = 0
    apart: int = 0

    def __str__(self) -> str:
        parts = [
            f"{self.fused} fused" if self.fused else "",
            f"{self.widened} of them with sums in float32" if self.widened else "",
            f"{self.loose} left to the builder" if self.loose else "",
            f"{self.apart} kept apart" if self.apart else "",
        ]
        return ", ".join(filter(None, parts))


def lacks_kernel(settled: Settled, reason: str) -> bool:
    """Whether a build may have failed, with ``reason``, for want of a fused kernel that was required."""
    return settled.fused > 0 and any(words in reason for words in _NO_KERNEL)


def settle_attention(opened: Session, network: Network, options: BuildOptions, *, loose: bool = False) -> Settled:
    """Decides for every attention of ``network`` what is asked of the builder.

    ``loose``: no kernel is required any more, for another attempt after a failure. Raises ``BuildFailed`` where nodes
    can't be taken apart.
    """
    library = opened.library
    softmaxes = _softmaxes(library, network)
    if options.attention == "fused" and softmaxes:
        raise BuildFailed(
            f"{opened} can't require a fused kernel (option attention=fused) of attention that the ONNX has as "
            "products and softmax",
            hint="leave the option out, or build from the recipe or checkpoints with --option opset=23",
        )
    if options.attention == "apart":
        _keep_apart(library, network, softmaxes)
    found = Settled(**{"apart" if options.attention == "apart" else "loose": len(softmaxes)})
    if not has(library, "LayerType.ATTENTION_OUTPUT") or not has(library, "IAttentionOutputLayer"):
        return found
    for output in list(_layers(network, library.LayerType.ATTENTION_OUTPUT)):
        node: AttentionOutput = _as(library.IAttentionOutputLayer, output)
        attention = node.attention
        query = attention.get_input(0)
        half = query.dtype in (library.DataType.HALF, library.DataType.BF16)
        if half and options.attention == "apart":
            raise BuildFailed(
                f"{opened} can't take Attention nodes apart (option attention=apart), and the ONNX has them",
                hint="export attention as products and softmax, up to opset 22: build from the recipe or checkpoints "
                "with --option attention=apart",
            )
        head = int(tuple(query.shape)[-1])
        usual = _FUSED_HEADS[0] <= head <= _FUSED_HEADS[1] and head % 8 == 0
        required = half and not loose and (usual or options.attention == "fused")
        attention.decomposable = not required
        if not half:
            continue
        if not required:
            found = found._replace(loose=found.loose + 1)
            continue
        widens = query.dtype == library.DataType.HALF and not options.fp16_sums and opened.sums_in_float32()
        widened = widens and _widen(library, network, attention, output.get_output(0))
        found = found._replace(fused=found.fused + 1, widened=found.widened + widened)
    return found


def _widen(library: Library, network: Network, attention: Attention, result: Tensor) -> bool:
    """Casts query, key and value to float32 and the result back; not where the result is the network's own output."""
    if any(network.get_output(index).name == result.name for index in range(network.num_outputs)):
        return False
    users = [
        (layer, index)
        for layer in _layers(network)
        for index in range(layer.num_inputs)
        if (given := layer.get_input(index)) is not None and given.name == result.name
    ]
    for index in range(3):
        attention.set_input(index, _cast(network, attention.get_input(index), library.DataType.FLOAT))
    narrowed = _cast(network, result, library.DataType.HALF)
    for layer, index in users:
        layer.set_input(index, narrowed)
    return True


def _softmaxes(library: Library, network: Network) -> list[Layer]:
    """Those in half precision."""
    half = (library.DataType.HALF, library.DataType.BF16)
    found = _layers(network, library.LayerType.SOFTMAX)
    return [layer for layer in found if (scores := layer.get_input(0)) is not None and scores.dtype in half]


def _keep_apart(library: Library, network: Network, softmaxes: list[Layer]) -> None:
    """Subtracts the largest value before each softmax."""
    for layer in softmaxes:
        scores = layer.get_input(0)
        assert scores is not None
        softmax: Softmax = _as(library.ISoftMaxLayer, layer)
        largest = network.add_reduce(scores, library.ReduceOperation.MAX, softmax.axes, True).get_output(0)
        shifted = network.add_elementwise(scores, largest, library.ElementWiseOperation.SUB)
        layer.set_input(0, shifted.get_output(0))


def _cast(network: Network, tensor: Tensor, dtype: Any) -> Tensor:
    return network.add_cast(tensor, dtype).get_output(0)


def _layers(network: Network, kind: Any = None) -> Iterator[Layer]:
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if kind is None or layer.type == kind:
            yield layer


def _as(theirs: Any, layer: Any) -> Any:
    layer.__class__ = theirs  # the bindings give out the base class
    return layer
