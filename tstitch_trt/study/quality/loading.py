"""Loads network files to run on the CPU: ONNX (``.onnx``) by ONNX Runtime, else TorchScript by PyTorch.

In a child process only (``foreign``): a script may do what it likes with time and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from tstitch_engines.backends.onnx_session import open_session
from tstitch_engines.errors import BadInput, TStitchError, first_line
from tstitch_engines.needs import require
from tstitch_engines.threads import default_threads

__all__ = ["Net", "open_network"]

_DTYPES: Final = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(uint8)": "uint8",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}


Run = Callable[[Sequence[Any], Mapping[str, Any]], dict[str, Any]]


@dataclass(kw_only=True)
class Net:
    """``inputs``, ``outputs``: names, as far as they are known. ``dtype``, ``channels`` (0: any) and ``size`` (height,
    width; ``None``: any) are those of the first input. ``keywords``: further arguments of a ``scripted`` network.

    ``run``: all outputs by name (by number where they have none) for the inputs in order, and keywords.
    """

    run: Run
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    dtype: str = "float32"
    channels: int = 0
    size: tuple[int, int] | None = None
    keywords: frozenset[str] = frozenset()
    scripted: bool = False


def open_network(path: Path, *, threads: int, what: str) -> Net:
    """Raises ``BadInput`` for a file that is neither, ``Unavailable`` for a missing library."""
    if not path.is_file():
        raise BadInput(f"the {what} {path} does not exist", hint="give a .onnx or TorchScript file")
    return (_open_onnx if path.suffix == ".onnx" else _open_script)(path, threads, what)


def _open_onnx(path: Path, threads: int, what: str) -> Net:
    onnxruntime = require("onnxruntime", f"a {what} in ONNX", extra="cpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.log_severity_level = 3
    try:
        session = open_session(path, settings=options)
    except TStitchError:
        raise
    except Exception as error:  # ONNX Runtime's own classes have no common base
        raise BadInput(
            f"the {what} {path} can't be read as ONNX: {first_line(error)}", hint="export it again"
        ) from None
    takes = session.get_inputs()
    shape = list(takes[0].shape) if takes else []
    if not takes or takes[0].type not in _DTYPES:
        raise BadInput(
            f"the {what} {path.name} takes {[(i.name, i.type) for i in takes]}; allowed first is one of "
            f"{', '.join(_DTYPES)}",
            hint="export it with a float32 input",
        )
    sides = tuple(s if isinstance(s, int) else 0 for s in shape[1:]) if len(shape) == 4 else (0, 0, 0)
    inputs, outputs = tuple(i.name for i in takes), tuple(o.name for o in session.get_outputs())

    def run(arrays: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
        try:
            found = session.run(None, dict(zip(inputs, arrays, strict=True)))
        except Exception as error:
            raise _refused(error, arrays) from None
        return dict(zip(outputs, found, strict=True))

    size = (sides[1], sides[2]) if sides[1] and sides[2] else None
    return Net(run=run, inputs=inputs, outputs=outputs, dtype=_DTYPES[takes[0].type], channels=sides[0], size=size)


def _open_script(path: Path, threads: int, what: str) -> Net:
    torch = require("torch", f"a {what} in TorchScript", instead="give the network as .onnx")
    try:
        module = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise BadInput(
            f"the {what} {path} can't be read as TorchScript: {first_line(error)}",
            hint="a file of weights alone is no network: load it in its own package and save "
            "torch.jit.trace(module, example) or an ONNX export",
        ) from None
    module.eval()
    names = [argument.name for argument in module.forward.schema.arguments if argument.name != "self"]

    def run(arrays: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
        before = torch.get_num_threads()
        try:
            if threads:
                torch.set_num_threads(threads)
            with torch.inference_mode():
                found = module(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays), **keywords)
        except RuntimeError as error:
            raise _refused(error, arrays) from None
        finally:
            torch.set_num_threads(before)
        if isinstance(found, torch.Tensor):
            found = [found]
        named = found if isinstance(found, Mapping) else {str(index): value for index, value in enumerate(found)}
        return {name: value.float().numpy() for name, value in named.items()}

    return Net(run=run, inputs=tuple(names), keywords=frozenset(names[1:]), scripted=True)


def _refused(error: Exception, arrays: Sequence[Any]) -> BadInput:
    lines = str(error).strip().splitlines()
    given = ", ".join(f"{array.dtype}{list(array.shape)}" for array in arrays)
    return BadInput(
        f"the network refuses {given}: {lines[-1] if lines else type(error).__name__}",
        hint="say how it is to be called: its size, range and channels",
    )
