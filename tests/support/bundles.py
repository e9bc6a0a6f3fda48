"""What tests do to bundles on disk: alter the manifest, read all files, draw from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tstitch_trt

__all__ = ["draw", "edit", "files", "of_version"]


def edit(bundle: Path, change: Any) -> None:
    """``change`` gets the manifest's members and alters them in place."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest["members"])
    path.write_text(json.dumps(manifest))


def of_version(version: str, *names: str) -> Any:
    def change(members: Any) -> None:
        for name in names:
            members[name]["engines"][0]["identity"]["backend_version"] = version

    return change


def files(bundle: Path) -> dict[str, bytes]:
    return {str(p.relative_to(bundle)): p.read_bytes() for p in bundle.rglob("*") if p.is_file()}


def draw(bundle: Path, **options: Any) -> Any:
    with tstitch_trt.load(bundle, **options) as runtime:
        return runtime.sample(labels=[1, 2], seed=5, steps=4, decode=False).latents
