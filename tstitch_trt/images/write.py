"""Where sampled images go: a grid in one PNG, a folder of PNGs, or an ADM-style ``.npz``."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import BadInput
from tstitch_trt.files import atomic_file, require_parent, write_bytes
from tstitch_trt.images.grid import grid, png_bytes, save_npz, save_png
from tstitch_trt.images.metadata import parameters_text

__all__ = ["METADATA_KEY", "join_npz", "kind_of", "picture_file", "png_name", "write_images"]

METADATA_KEY = "tstitch-trt"  # the PNG text chunk that holds the settings as JSON
_MANY = 100_000

Kind = Literal["png", "npz", "folder"]


def kind_of(path: Path, *, option: str = "-o") -> Kind:
    """The kind of output, by the suffix of ``path``. Raises ``BadInput`` for another suffix or a missing parent."""
    suffix = path.suffix.lower()
    if path.is_dir() or suffix == "":
        if path.exists() and not path.is_dir():
            raise BadInput(f"{option} {str(path)!r} is a file without a suffix", hint="name it FILE.png or FILE.npz")
        require_parent(path, option=option)
        return "folder"
    if suffix not in (".png", ".npz"):
        raise BadInput(
            f"{option} {str(path)!r}: images can't be written as {suffix!r}; allowed: .png (a grid), .npz (ADM style) "
            "or a folder (one PNG per image)",
            hint=f"write e.g. {option} {path.with_suffix('.png')}",
        )
    require_parent(path, option=option)
    return "png" if suffix == ".png" else "npz"


def write_images(
    path: Path, images_NHWC: NDArray[np.uint8], settings: Mapping[str, Any], each: Sequence[Mapping[str, Any]]
) -> list[Path]:
    """Writes the images as ``kind_of(path)`` says and returns the files, whole or none of them.

    ``settings`` go into every PNG's text; ``each`` adds an image's own (seed, label or prompt). Pictures of prompts
    have a text ``parameters`` besides, for picture browsers.
    """
    kind = kind_of(path)
    if kind == "npz":
        save_npz(path, images_NHWC)
        return [path]
    if kind == "png":
        scale = max(1, 64 // max(images_NHWC.shape[1:3]))  # small pictures are shown enlarged
        save_png(path, grid(images_NHWC, scale=scale), _text({**settings, "images": list(each)}, images_NHWC))
        return [path]
    return _write_folder(path, images_NHWC, settings, each)


def _write_folder(
    folder: Path, images_NHWC: NDArray[np.uint8], settings: Mapping[str, Any], each: Sequence[Mapping[str, Any]]
) -> list[Path]:
    names = [png_name(index, len(images_NHWC)) for index in range(len(images_NHWC))]
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        scratch.chmod(0o755)
        for name, image, own in zip(names, images_NHWC, each, strict=True):
            write_bytes(scratch / name, picture_file(image, settings, own))
        if folder.is_dir():  # files of others in it stay
            for name in names:
                (scratch / name).replace(folder / name)
        else:
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return [folder / name for name in names]


def png_name(index: int, count: int) -> str:
    """The name of picture ``index`` (from 0) in a folder of ``count``."""
    return f"{index:0{5 if count <= _MANY else len(str(count))}d}.png"


def picture_file(image_HWC: NDArray[np.uint8], settings: Mapping[str, Any], own: Mapping[str, Any]) -> bytes:
    """One picture as a PNG file that holds ``settings`` and what is its ``own``."""
    return png_bytes(grid(image_HWC[None]), _text({**settings, **own}, image_HWC[None]))


def _text(settings: Mapping[str, Any], images_NHWC: NDArray[np.uint8]) -> dict[str, str]:
    text = {METADATA_KEY: json.dumps(settings, allow_nan=False), "Software": "tstitch-trt"}
    parameters = parameters_text(settings, size=(images_NHWC.shape[2], images_NHWC.shape[1]))
    return text if parameters is None else {"parameters": parameters, **text}


def join_npz(path: Path, parts: Iterable[NDArray[np.uint8]], shape: tuple[int, ...]) -> None:
    """Writes ``arr_0`` uint8 of ``shape`` from its ``parts`` along the first axis, one of them in memory at a time.

    It is what ``save_npz`` writes. Raises ``ValueError`` where the parts are not of that shape together.
    """
    rows = 0
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            for part in parts:
                if part.dtype != np.uint8 or part.shape[1:] != shape[1:]:
                    raise ValueError(f"a part is {part.dtype}{list(part.shape)}; the whole is uint8{list(shape)}")
                rows += len(part)
                entry.write(np.ascontiguousarray(part).data)
        if rows != shape[0]:
            raise ValueError(f"the parts have {rows:,} rows; the whole is uint8{list(shape)}")
