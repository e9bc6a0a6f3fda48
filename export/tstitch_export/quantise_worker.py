"""The process that quantises one graph with nvidia-modelopt: a request as JSON on stdin, a reply on what was stdout.

    python -m tstitch_export.quantise_worker

It is a process of its own because modelopt replaces parts of ONNX Runtime for good, logs to stdout and leaves files in
the temporary directory. Whatever writes to stdout goes to stderr.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from typing import Final

import msgspec

__all__ = ["Reply", "Request", "main"]

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


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
    from modelopt.onnx.quantization import quantize

    with np.load(request.calibration) as archive:
        calibration = {name: archive[name] for name in archive.files}
    shapes = {name: (request.batch, *values.shape[1:]) for name, values in calibration.items()}
    quantize(
        request.model,
        quantize_mode=request.mode,
        calibration_data=calibration,
        calibration_shapes=",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items()),
        calibration_method=request.method,
        calibration_eps=["cpu"],
        output_path=request.output,
        high_precision_dtype=request.high_precision,
        nodes_to_quantize=list(request.nodes),
        use_external_data_format=request.external,
        # What to quantise is decided already: no further search for attention or thin products.
        disable_mha_qdq=True,
        enable_gemv_detection_for_trt=False,
        dq_only=True,  # weights in 8 bits, not rounded ones in 16
        log_level="WARNING",
    )


def main() -> int:
    with suppress(OSError):  # our parent kills us; should it be killed itself, the kernel does
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    try:
        _quantise(request)
        reply = Reply()
    except ImportError as error:
        reply = Reply(error=str(error), missing=True)
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        reply = Reply(error=f"{type(error).__name__}: {reason}")
    answers.write(msgspec.json.encode(reply))
    answers.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries that crash while they are unloaded must not spoil a finished graph


if __name__ == "__main__":
    sys.exit(main())
