"""PyTorch -> ONNX: one strongly typed graph per member, validated, and checked against PyTorch on random input."""

from __future__ import annotations

import inspect
import io
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tstitch_engines.backends.onnx_session import open_session
from tstitch_engines.bundle.manifest import ExportCheck, Precision
from tstitch_engines.errors import BuildFailed, TStitchError, first_line
from tstitch_engines.needs import require
from tstitch_engines.progress import Progress
from tstitch_engines.quiet import silence_output
from tstitch_engines.spec import parse_dimension
from tstitch_engines.threads import default_threads
from tstitch_export.families.base import TORCH_NAMES, Family, Inspection
from tstitch_export.onnx_export.graph import retyped_to_float32, tidy, validate
from tstitch_export.onnx_export.weight_map import write_weight_map
from tstitch_export.planning.opset import OPSET

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

__all__ = ["GRAPH", "OPSET", "PROGRAM", "WEIGHT_MAP", "check_graph", "export_onnx", "export_program"]

_log = logging.getLogger(__name__)

GRAPH: Final = "model.onnx"
PROGRAM: Final = "model.pt2"
WEIGHT_MAP: Final = "weights.json"
_INLINE_LIMIT: Final = 32 << 20  # bytes of weights above which they go into a file beside the graph
_MAX_BATCH: Final = 65535

_CHECK_BATCHES: Final = (1, 3)  # neither is the batch it is traced with
# Largest allowed difference, as a share of the largest output and as relative L2. In fp16 every product is rounded to
# 11 bits and a deep network adds up hundreds of such roundings; bf16 is compared with its arithmetic widened (see
# `check_graph`), so only the constants that the tracer rounded to 8 bits differ.
_TOLERANCE: Final[dict[Precision, float]] = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 1e-2}


def export_onnx(
    family: Family,
    inspection: Inspection,
    *,
    precision: Precision,
    folder: Path,
    progress: Progress,
    opset: int | None = None,
) -> ExportCheck:
    """Writes ``model.onnx`` (and ``model.onnx.data`` when the weights are large) into ``folder`` and checks it.

    ``opset``: ``None`` for the usual one of ``precision``. Where the family knows LoRAs, also ``weights.json``, the map
    of its weights (``tstitch_engines.bundle.weights``).

    Raises ``BuildFailed`` when the export fails or computes something else than PyTorch.
    """
    torch = require("torch", "exporting a checkpoint")
    require("onnxscript", "exporting to ONNX")
    path = folder / GRAPH
    progress("load", 0.0)
    model = family.load(inspection)
    progress("trace", 0.1)
    with _explained("exporting", inspection), silence_output():
        program = _trace(family, inspection, model, precision)
        inputs, outputs = family.inputs(inspection, precision), family.outputs(inspection, precision)
        exported = torch.onnx.export(
            program,
            (),
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
            dynamo=True,
            opset_version=OPSET[precision] if opset is None else opset,
            verbose=False,
        )
        weights = sum(p.numel() * p.element_size() for p in (*program.parameters(), *program.buffers()))
        del program
        progress("write", 0.5)
        exported.save(path, external_data=weights > _INLINE_LIMIT)
        del exported
        tidy(path, inputs=inputs, outputs=outputs)
    progress("check", 0.7)
    with _explained("validating the export of", inspection), silence_output():
        validate(path, inputs=inputs, outputs=outputs)
        if (target := family.lora_target(inspection)) is not None:
            write_weight_map(path, model, target, folder / WEIGHT_MAP)
    del model  # tracing moved it to its precision, and two of a full-size model may be more than there is memory
    check = check_graph(path, family, inspection, precision)
    progress("check", 1.0)
    return check


def export_program(
    family: Family, inspection: Inspection, *, precision: Precision, output: Path, progress: Progress
) -> None:
    """Writes the member as a ``torch.export`` archive (.pt2), what the ``torch`` backend compiles."""
    torch = require("torch", "exporting a checkpoint for --backend torch")
    progress("trace", 0.0)
    with _explained("exporting", inspection), silence_output():
        # Through memory: PyTorch's own file writer ends the whole process when the disk is full.
        archive = io.BytesIO()
        torch.export.save(_trace(family, inspection, family.load(inspection), precision), archive)
    output.write_bytes(archive.getbuffer())
    progress("trace", 1.0)


def check_graph(path: Path, family: Family, inspection: Inspection, precision: Precision) -> ExportCheck:
    """Compares the graph at ``path`` on ONNX Runtime's CPU provider with the model (float32) in PyTorch.

    fp32 and fp16 graphs run as they are, so fp16's difference includes its rounding. ONNX Runtime lacks bfloat16
    kernels on CPU: a bf16 graph is widened to float32 and compared with the model of bfloat16-rounded weights, which
    checks structure and weights but not the rounding of activations. One of the two is in memory at a time. Raises
    ``BuildFailed`` above the tolerance or when a value is not finite.
    """
    import torch

    against = f"torch {torch.__version__} float32"
    if precision == "bf16":
        against += " with bfloat16-rounded weights, the graph widened to float32"
    sums = {spec.name: _Difference() for spec in family.outputs(inspection, precision)}
    with _explained("checking the export of", inspection), silence_output():
        wanted = _reference(family, inspection, precision)
        session = _widened_session(path) if precision == "bf16" else _session(path)
        for feeds, want in wanted:
            names = list(sums)
            for name, got, right in zip(names, session.run(names, feeds), want, strict=True):
                sums[name].add(got.astype("float64"), right)
    worst = max(found.largest for found in sums.values())
    relative = max(found.relative for found in sums.values())
    peak = max(found.peak for found in sums.values())
    limit = _TOLERANCE[precision]
    if not math.isfinite(relative):
        raise BuildFailed(
            f"{inspection.path.name} gives NaN or infinity in {precision}",
            hint="its activations leave the range of float16: build with --precision bf16 or fp32"
            if precision == "fp16"
            else "check the checkpoint in PyTorch",
        )
    if relative > limit or any(found.largest > limit * (found.peak or 1.0) for found in sums.values()):
        raise BuildFailed(
            f"the {precision} graph of {inspection.path.name} differs from PyTorch: relative L2 {relative:.2e}, "
            f"largest {worst:.2e} of {peak:.2e}; allowed is {limit:.0e}",
            hint="build with --precision fp32"
            if precision != "fp32"
            else "please report this with the versions of torch and onnxscript: tstitch-trt doctor",
        )
    _log.info("%s: %s graph equals PyTorch within %.1e", inspection.path.name, precision, relative)
    return ExportCheck(max_abs=worst, rel_l2=relative, batches=_CHECK_BATCHES, against=against)


def _reference(
    family: Family, inspection: Inspection, precision: Precision
) -> list[tuple[dict[str, NDArray[Any]], list[NDArray[np.float64]]]]:
    """Random inputs in the graph's types, and what the model gives for them in PyTorch, in float32."""
    import torch

    model = family.load(inspection)
    if precision == "bf16":
        model = model.to(torch.bfloat16).float()
    specs = family.inputs(inspection, precision)
    found = []
    for index, batch in enumerate(_CHECK_BATCHES):
        inputs = family.example(inspection, batch=batch, seed=batch, sizes=_check_sizes(family, inspection, index))
        rounded = [
            x.to(getattr(torch, spec.dtype)).float() if x.is_floating_point() else x
            for spec, x in zip(specs, inputs, strict=True)
        ]
        with torch.inference_mode():
            out = model(*rounded)
        feeds = {spec.name: x.numpy() for spec, x in zip(specs, rounded, strict=True)}
        if precision == "fp16":
            feeds = {spec.name: feeds[spec.name].astype(spec.dtype) for spec in specs}
        found.append((feeds, [x.double().numpy() for x in (out if isinstance(out, tuple) else (out,))]))
    return found


def _trace(family: Family, inspection: Inspection, model: nn.Module, precision: Precision) -> Any:
    """A ``torch.export`` program with a dynamic batch. Moves ``model`` to the precision; the timestep stays float32."""
    import torch

    dtype = getattr(torch, TORCH_NAMES[precision])
    batch = torch.export.Dim("B", min=1, max=_MAX_BATCH)
    dims = family.dims(inspection)
    roots = {name: torch.export.Dim(f"{name}x{dim.multiple}", min=1, max=dim.most // dim.multiple)
             for name, dim in dims.items()}  # fmt: skip
    specs = family.inputs(inspection, precision)
    # Traced with 2: a size of 1 would be taken for a constant.
    example = family.example(inspection, batch=2, seed=0, sizes=_check_sizes(family, inspection, 0))
    example = tuple(
        x.to(getattr(torch, spec.dtype)) if x.is_floating_point() else x for spec, x in zip(specs, example, strict=True)
    )

    def dynamic(size: int | str) -> Any:
        if isinstance(size, int):
            return None
        if size == "B":
            return batch
        factor, name, part = parse_dimension(size)
        share, rest = divmod(factor * dims[name].multiple, part)
        assert not rest, f"{size} of a {name} in multiples of {dims[name].multiple} is no whole number"
        return share * roots[name] if share > 1 else roots[name]

    shapes = [{axis: dynamic(size) for axis, size in enumerate(spec.shape) if isinstance(size, str)} for spec in specs]
    with torch.no_grad():
        return torch.export.export(
            model.to(dtype), example, dynamic_shapes=_like_parameters(shapes, model.forward), strict=False
        )


def _like_parameters(shapes: list[Any], forward: Callable[..., Any]) -> tuple[Any, ...]:
    """One per parameter of ``forward``: those that a ``*parameter`` takes are a tuple."""
    kinds = [parameter.kind for parameter in inspect.signature(forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(shapes)
    own = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*shapes[:own], tuple(shapes[own:]))


def _check_sizes(family: Family, inspection: Inspection, index: int) -> dict[str, int]:
    """Small sizes of the dynamic dimensions, all different, and others for each ``index``."""
    names = sorted(family.dims(inspection).items())
    return {name: dim.multiple * (2 + (place + index) % 3) for place, (name, dim) in enumerate(names)}


class _Difference:
    """How far an output is from the right one, over several calls."""

    def __init__(self) -> None:
        self.largest = self.peak = self._squares = self._total = 0.0

    def add(self, got: NDArray[np.float64], want: NDArray[np.float64]) -> None:
        difference = abs(got - want)
        self.largest = max(self.largest, float(difference.max()))
        self.peak = max(self.peak, float(abs(want).max()))
        self._squares += float((difference**2).sum())
        self._total += float((want**2).sum())

    @property
    def relative(self) -> float:
        return math.sqrt(self._squares / self._total) if self._total else math.sqrt(self._squares)


def _widened_session(path: Path) -> Any:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".widened-") as folder:
        twin = Path(folder) / GRAPH
        retyped_to_float32(path, twin)
        return _session(twin)


def _session(path: Path) -> Any:
    ort = require("onnxruntime", "checking an export against PyTorch", extra="cpu")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = default_threads()
    return open_session(path, [file.name for file in path.parent.iterdir()], settings=options)  # all of them ours


@contextmanager
def _explained(doing: str, inspection: Inspection) -> Iterator[None]:
    """Turns what another library raises into ``BuildFailed``; our own errors and a full disk pass as they are."""
    try:
        yield
    except (TStitchError, OSError):
        raise
    except Exception as error:
        reason = first_line(error)
        memory = isinstance(error, MemoryError) or "alloc" in reason
        raise BuildFailed(
            f"{doing} {inspection.path.name} failed: {type(error).__name__}: {reason}",
            hint="free memory, or export on a larger machine and copy the bundle"
            if memory
            else "run again with --traceback for the whole story; tstitch-trt doctor lists the library versions",
        ) from error
