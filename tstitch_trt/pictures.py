"""Pictures and latents: the VAE's engines, whole or in tiles, and picture files to start from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import BadInput, OutOfProfile
from tstitch_engines.spec import Range
from tstitch_trt.parts import Part
from tstitch_trt.tiling import Blend, Tiles, tiles_of

__all__ = ["LatentDecoder", "PictureEncoder", "Tile", "read_mask", "read_picture", "to_pixels"]

_log = logging.getLogger(__name__)

Array = NDArray[np.float32]
Pixels = NDArray[np.uint8]

Tile = Literal["auto", "off"] | int
"""``auto``: whole pictures where the engine takes them, else tiles as large as it takes. ``off``: never tiles.
A number: tiles of that many pixels a side."""

_SIDES: Final = (("H", "height"), ("W", "width"))


class _Half:
    """What both halves of a VAE share: sizes, and which tiles to use."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self.factor = int(part.network.config["factor"])

    def _tiles(self, size: tuple[int, int], tile: Tile) -> Tiles:
        """``size``: height and width of the latent. Raises ``OutOfProfile``, ``BadInput``."""
        ranges = [self._part.profile.dims[dim] for dim, _ in _SIDES]
        sides = []
        for (_, word), allowed, length in zip(_SIDES, ranges, size, strict=True):
            wanted = allowed.max if isinstance(tile, str) else self._asked(tile, allowed)
            side = min(wanted, length)
            if side < allowed.min or (tile == "off" and length > allowed.max):
                raise self._outside(word, length, allowed)
            sides.append(side)
        return tiles_of(size, (sides[0], sides[1]))

    def check(self, size: tuple[int, int], tile: Tile) -> None:
        """Raises ``OutOfProfile`` and ``BadInput`` as working on latents of this size would; says so if in tiles."""
        tiles = self._tiles(size, tile)
        if len(tiles) > 1:
            f = self.factor
            _log.info("%s: %d tiles of %dx%d pixels", self._part.name, len(tiles), f * tiles.width, f * tiles.height)

    def _asked(self, tile: int, allowed: Range) -> int:
        side, rest = divmod(tile, self.factor)
        if isinstance(tile, bool) or rest or not allowed.min <= side <= allowed.max:
            f, least, most = self.factor, self.factor * allowed.min, self.factor * allowed.max
            raise BadInput(
                f"tiles of {tile} pixels; {self._part.name} takes {least} to {most}, in steps of {f}",
                hint=f"e.g. tile={most}, or tile='auto'",
            )
        return side

    def _outside(self, word: str, length: int, allowed: Range) -> OutOfProfile:
        f = self.factor
        return OutOfProfile(
            f"{self._part.name}: {word} {f * length} is outside its profile; allowed is {f * allowed.min} to "
            f"{f * allowed.max} pixels",
            hint="let it work in tiles: tile='auto'"
            if length > allowed.max
            else f"build again with a wider --{word} MIN:OPT:MAX",
        )

    def close(self) -> None:
        self._part.close()


class LatentDecoder(_Half):
    """The part ``vae_decoder``."""

    def images(self, latents: Array, *, tile: Tile = "auto") -> Array:
        """Latents float32 ``[N,C,h,w]`` in the bundle's scaling to images ``[N,3,H,W]`` in about [-1, 1].

        A tile sees nothing beyond its edges, and a KL decoder normalises by the mean and variance of what it sees:
        tiled pictures differ a little from whole ones, most where tiles are small.
        """
        size = (latents.shape[2], latents.shape[3])
        tiles = self._tiles(size, tile)
        blend = Blend(tiles, size, factor=self.factor)
        for y, x in tiles:
            part = latents[:, :, y : y + tiles.height, x : x + tiles.width]
            blend.add((y, x), self._part({"latent": part}, {"H": tiles.height, "W": tiles.width})["image"])
        return blend.result()

    def decode(self, latents: Array, *, tile: Tile = "auto") -> Pixels:
        """Latents float32 ``[N,C,h,w]`` to pictures uint8 ``[N,H,W,3]``."""
        return to_pixels(self.images(latents, tile=tile))


class PictureEncoder(_Half):
    """The part ``vae_encoder``; a ``starting.Encoder``."""

    def encode(self, pictures: Array, *, tile: Tile = "auto") -> tuple[Array, Array]:
        """Pictures float32 ``[N,3,H,W]`` in [-1, 1] to mean and standard deviation of their latents ``[N,C,h,w]``.

        Raises ``BadInput`` for a size that is no multiple of the factor.
        """
        height, width = pictures.shape[2:]
        f = self.factor
        if height % f or width % f:
            raise BadInput(
                f"the picture is {width}x{height} pixels; both must be multiples of {f}",
                hint=f"resize it, e.g. to {max(f, width // f * f)}x{max(f, height // f * f)}",
            )
        size = (height // f, width // f)
        tiles = self._tiles(size, tile)
        blends = {name: Blend(tiles, size, factor=1) for name in ("mean", "std")}
        for y, x in tiles:
            part = pictures[:, :, f * y : f * (y + tiles.height), f * x : f * (x + tiles.width)]
            found = self._part({"image": part}, {"H": tiles.height, "W": tiles.width})
            for name, blend in blends.items():
                blend.add((y, x), found[name])
        return blends["mean"].result(), blends["std"].result()


def to_pixels(images_NCHW: Array) -> Pixels:
    """[-1, 1] to uint8 ``[N,H,W,C]``; what lies outside is clamped."""
    scaled = np.clip(np.rint((images_NCHW + np.float32(1)) * np.float32(127.5)), 0, 255)
    return np.ascontiguousarray(scaled.astype(np.uint8).transpose(0, 2, 3, 1))


def read_picture(
    path: Path, *, size: tuple[int, int] | None = None, resize: bool = False, what: str = "image"
) -> Pixels:
    """A picture file as uint8 RGB ``[H,W,3]``, upright as its EXIF says; transparency becomes white.

    ``size``: the height and width it must have. Another is refused, or with ``resize`` brought to it (Lanczos) without
    keeping its proportions. ``what``: its name in messages. Raises ``BadInput``.
    """
    from PIL import Image

    picture = _open(path, what)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(_sized(picture.convert("RGB"), path, size, resize, what))


def read_mask(path: Path, *, size: tuple[int, int] | None = None, resize: bool = False, what: str = "mask") -> Pixels:
    """A mask file as grey uint8 ``[H,W]``: from 128 on is painted anew. Otherwise as ``read_picture``."""
    picture = _open(path, what)
    if picture.mode != "L":  # made grey after it was resized, as diffusers does it
        picture = picture.convert("RGB")
    return np.asarray(_sized(picture, path, size, resize, what).convert("L"))


def _open(path: Path, what: str) -> Any:
    from PIL import Image, ImageOps, UnidentifiedImageError

    hint = "give a picture file, e.g. PNG or JPEG"
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)
    except UnidentifiedImageError:
        raise BadInput(f"{what} {path} is no picture that can be read", hint=hint) from None
    except Image.DecompressionBombError as error:
        raise BadInput(f"{what} {path} is too large: {error}", hint="make it smaller first") from None
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: Pillow's word for a broken PNG
        problem = "does not exist" if isinstance(error, FileNotFoundError) else f"can't be read: {error}"
        raise BadInput(f"{what} {path} {problem}", hint=hint) from None


def _sized(picture: Any, path: Path, size: tuple[int, int] | None, resize: bool, what: str) -> Any:
    from PIL import Image

    if size is None or (picture.height, picture.width) == size:
        return picture
    if not resize:
        raise BadInput(
            f"{what} {path} is {picture.width}x{picture.height} pixels; needed is {size[1]}x{size[0]}",
            hint=f"have it resized (--resize), or draw in its size: --size {picture.width}x{picture.height}",
        )
    return picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)
