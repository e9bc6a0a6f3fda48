"""Bundles whose engines are PyTorch programs, made without a build: what a stranger may send."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tstitch_engines.bundle.bundle import MANIFEST, open_bundle
from tstitch_engines.bundle.files import hash_file
from tstitch_engines.bundle.manifest import Component, EngineRecord, Network

__all__ = ["PROGRAM", "exported_program", "put_engine", "with_torch_engines"]

PROGRAM = "engines/program.pt2"


def exported_program(network: Network) -> bytes:
    """A program with the inputs and outputs of ``network`` (a class member), that computes next to nothing."""
    import torch

    channels = network.outputs[0].shape[1]

    class Doubled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((1,), 0.5))

        def forward(self, sample: Any, timestep: Any, labels: Any) -> Any:
            scale = self.weight * (timestep + labels)[:, None, None, None] / 1000
            return (sample * scale).repeat(1, channels // sample.shape[1], 1, 1)

    batch = torch.export.Dim("B", min=1, max=1 << 15)
    inputs = tuple(
        torch.from_numpy(np.ones([2 if size == "B" else size for size in spec.shape], spec.dtype))
        for spec in network.inputs
    )
    program = torch.export.export(Doubled(), inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    archive = io.BytesIO()
    torch.export.save(program, archive)
    return archive.getvalue()


def with_torch_engines(bundle: Path, output: Path) -> bytes:
    """Copies ``bundle`` with one engine per member, a PyTorch program that this machine never compiled; the program."""
    import torch

    shutil.copytree(bundle, output)
    opened = open_bundle(output)
    content = exported_program(next(iter(opened.manifest.members.values())))
    members = {}
    for name, member in opened.manifest.members.items():
        identity = msgspec.structs.replace(
            member.engines[0].identity, backend="torch", backend_version=str(torch.__version__), arch="cpu", options={}
        )
        part = Component(path=f"{name}/{PROGRAM}", sha256="", bytes=0)
        members[name] = msgspec.structs.replace(member, engines=(EngineRecord(files=(part,), identity=identity),))
    manifest = msgspec.structs.replace(opened.manifest, members=members)
    (output / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    put_engine(output, content)
    return content


def put_engine(bundle: Path, content: bytes, path: str = PROGRAM) -> None:
    """Makes ``content`` the file ``path`` of every member, with the right size and hash in the manifest."""
    data = msgspec.json.decode((bundle / MANIFEST).read_bytes())
    for name, member in data["members"].items():
        file = bundle / name / path
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        sha256, size = hash_file(file)
        member["engines"][0]["files"] = [{"path": f"{name}/{path}", "sha256": sha256, "bytes": size}]
    (bundle / MANIFEST).write_bytes(msgspec.json.encode(data))
