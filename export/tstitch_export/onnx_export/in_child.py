"""Exports in a child process: a checkpoint may describe a model that takes any time or memory to trace and check."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Final

import msgspec

from tstitch_engines.bundle.manifest import ExportCheck, Precision
from tstitch_engines.child import Channel, Job, Limits, run_in_child
from tstitch_engines.errors import BuildFailed
from tstitch_engines.needs import require_installed
from tstitch_engines.progress import Progress
from tstitch_export.families import Family, Inspection, open_family

__all__ = ["export_in_child"]

_SECONDS: Final = 7200.0  # the limit of one export unless another is given


class ExportRequest(msgspec.Struct, frozen=True, kw_only=True):
    """``inspection``: pickled, by the parent. ``program``: its name where a ``torch.export`` archive is wanted."""

    family: str
    inspection: bytes
    precision: Precision
    folder: str
    program: str
    opset: int


def export_here(request: ExportRequest, channel: Channel) -> ExportCheck | None:
    """Exports in this process, which is the child; nothing where it writes an archive."""
    from tstitch_export.onnx_export.exporter import export_onnx, export_program

    inspection: Inspection = pickle.loads(request.inspection)  # noqa: S301 - our parent's own object, not a file
    family, folder, precision = open_family(request.family), Path(request.folder), request.precision
    if not request.program:
        return export_onnx(
            family, inspection, precision=precision, folder=folder, progress=channel.progress, opset=request.opset
        )
    output = folder / request.program
    export_program(family, inspection, precision=precision, output=output, progress=channel.progress)
    return None


def export_in_child(
    family: Family,
    inspection: Inspection,
    *,
    precision: Precision,
    folder: Path,
    progress: Progress,
    limits: Limits,
    what: str,
    opset: int,
    program: str = "",
) -> ExportCheck | None:
    """``export_onnx``, or ``export_program`` into the file ``program`` of ``folder``, in a child. ``what`` is exported.

    Raises what they raise, ``OutOfTime`` and ``OutOfMemory``.
    """
    for package in ("torch",) if program else ("torch", "onnxscript"):
        require_installed(package, "exporting a checkpoint")
    request = ExportRequest(
        family=family.name,
        inspection=pickle.dumps(inspection),
        precision=precision,
        folder=str(folder.absolute()),
        program=program,
        opset=opset,
    )
    job = Job(
        what=f"the process exporting {what}",
        seconds=_SECONDS,
        limits=limits,
        error=BuildFailed,
        if_killed="free memory, or build on a machine with more and copy the bundle",
        if_crashed="report this message with tstitch-trt doctor",
    )
    return run_in_child(export_here, request, job, progress=progress)
