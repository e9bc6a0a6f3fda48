"""Quantises one graph with nvidia-modelopt, in a child process: modelopt replaces parts of ONNX Runtime, logs to stdout
and leaves temporary files.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from tstitch_engines.child import Channel
from tstitch_engines.errors import first_line

__all__ = ["Reply", "Request", "quantise"]

_INT8_TOP: Final = 127.0
_FLOAT8_TOP: Final = 448.0  # float8 e4m3fn


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """``calibration``: an .npz with one array per input, the rows of all of them along the first axis.

    ``batch``: rows per call. ``external``: the weights lie beside the graphs.
    """

    model: str
    output: str
    mode: str
    calibration: str
    batch: int
    method: str
    high_precision: str
    nodes: tuple[str, ...]
    external: bool


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """``error`` is empty when the output was written."""

    error: str = ""
    missing: bool = False  # a module could not be imported


def _quantise(request: Request) -> None:
    import numpy as np
    import onnx
    from modelopt.onnx.quantization import quantize
    from modelopt.onnx.quantization.qdq_utils import qdq_to_dq
    from modelopt.onnx.utils import save_onnx

    with np.load(request.calibration) as archive:
        calibration = {name: archive[name] for name in archive.files}
    shapes = {name: (request.batch, *values.shape[1:]) for name, values in calibration.items()}
    quantize(
        request.model,
        quantize_mode="int8",
        calibration_data=calibration,
        calibration_shapes=",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items()),
        calibration_method=request.method,
        calibration_eps=["cpu"],
        output_path=request.output,
        high_precision_dtype=request.high_precision,
        nodes_to_quantize=[f"{re.escape(node)}$" for node in request.nodes],  # patterns, matched at the start of names
        use_external_data_format=request.external,
        # What to quantise is decided already: no further search for attention or thin products.
        disable_mha_qdq=True,
        enable_gemv_detection_for_trt=False,
        log_level="WARNING",
    )
    model = onnx.load(request.output)
    if request.mode == "fp8":
        _to_float8(model)
    save_onnx(qdq_to_dq(model), request.output, request.external)  # weights in 8 bits, not rounded ones in 16


def _to_float8(model: Any) -> None:
    """Turns int8 Q/DQ nodes into float8 ones of the same ranges: amax / 127 becomes amax / 448.

    modelopt's own fp8 mode makes the same detour but multiplies by 448 / 127 (0.47, ``fp8.py``), which leaves amax at
    36 of the 448 that float8 e4m3fn reaches, and more of the small values below its normal numbers.
    """
    import numpy as np
    import onnx

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    done: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = stored[node.input[1]], stored[node.input[2]]
        if zero.name not in done:
            zeros = bytes(int(np.prod(zero.dims)))
            zero.CopyFrom(onnx.helper.make_tensor(zero.name, onnx.TensorProto.FLOAT8E4M3FN, zero.dims, zeros, raw=True))
        if scale.name not in done:
            kind = scale.data_type
            values = onnx.numpy_helper.to_array(scale).astype(np.float32) * (_INT8_TOP / _FLOAT8_TOP)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
            scale.CopyFrom(onnx.numpy_helper.from_array(values.astype(dtype), scale.name))
        done |= {scale.name, zero.name}


def quantise(request: Request, channel: Channel) -> Reply:
    try:
        _quantise(request)
    except ImportError as error:
        return Reply(error=str(error), missing=True)
    except Exception as error:
        return Reply(error=f"{type(error).__name__}: {first_line(error).strip()}")
    return Reply()
