"""Pictures and latents: the VAE's engines, whole or in tiles."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import ComponentName, Manifest
from tstitch_engines.checks import plain_number, shown
from tstitch_engines.errors import BadInput, OutOfProfile, Unavailable
from tstitch_engines.trace import span
from tstitch_trt.request.arrays import read_array, to_float32
from tstitch_trt.request.init_image import Encode
from tstitch_trt.runtime.component import Component
from tstitch_trt.runtime.tiling import Blend, Tiles, tiles_of

__all__ = ["Tile", "Vae", "VaeDecoder", "VaeEncoder", "check_tile", "to_pixels"]

_log = logging.getLogger(__name__)

Array = NDArray[np.float32]
Pixels = NDArray[np.uint8]

Tile = Literal["auto", "off"] | int
"""``auto``: whole pictures where the engine takes them, else tiles as large as it takes. ``off``: never tiles.
A number: tiles of that many pixels a side."""

_SIDES: Final = (("H", "height"), ("W", "width"))


def check_tile(value: object, what: str) -> Tile:
    """How the VAE takes pictures."""
    number = plain_number(value)
    if isinstance(number, int) and 0 < number < 2**31:
        return number
    if isinstance(value, str) and value in ("auto", "off"):
        return "off" if value == "off" else "auto"
    raise BadInput(
        f"{what} = {shown(value)}; allowed are 'auto', 'off' and a number of pixels", hint="e.g. tile=512, or 'auto'"
    )


class _Half:
    """One half of a VAE: its sizes, and its tiles."""

    def __init__(self, part: Component) -> None:
        self._part = part
        self.factor = int(part.network.config["factor"])

    def _tiles(self, size: tuple[int, int], tile: Tile) -> Tiles:
        """``size``: height and width of the latent. Raises ``OutOfProfile``, ``BadInput``."""
        name, f, sides = self._part.name, self.factor, []
        for (dim, word), length in zip(_SIDES, size, strict=True):
            allowed = self._part.profile.dims[dim]
            least, most = f * allowed.min, f * allowed.max
            side, rest = (allowed.max, 0) if isinstance(tile, str) else divmod(tile, f)
            if isinstance(tile, bool) or rest or not allowed.min <= side <= allowed.max:
                raise BadInput(
                    f"tiles of {tile} pixels; {name} takes {least} to {most}, in steps of {f}",
                    hint=f"e.g. tile={most}, or tile='auto'",
                )
            side = min(side, length)
            if side < allowed.min or (tile == "off" and length > allowed.max):
                fix = "use tiles: tile='auto'"
                if length <= allowed.max:
                    fix = f"build again with a wider --{word} MIN:OPT:MAX"
                raise OutOfProfile(
                    f"{name}: {word} {f * length} is outside its profile; allowed is {least} to {most} pixels", hint=fix
                )
            sides.append(side)
        return tiles_of(size, (sides[0], sides[1]))

    def check(self, size: tuple[int, int], tile: Tile) -> None:
        """Raises ``OutOfProfile`` and ``BadInput`` as a call with latents of this size would. Logs tiles."""
        tiles = self._tiles(size, tile)
        if len(tiles) > 1:
            f = self.factor
            _log.info("%s: %d tiles of %dx%d pixels", self._part.name, len(tiles), f * tiles.width, f * tiles.height)

    def _run(
        self,
        name: str,
        array: Array,
        size: tuple[int, int],
        tile: Tile,
        outputs: Mapping[str, int],
        *,
        finite: bool = True,
    ) -> dict[str, Array]:
        """The engine's ``outputs``, each with its elements per element of the latent of ``size`` along a side.

        ``array``: the input ``name``, latents or pictures of that size.
        """
        tiles = self._tiles(size, tile)
        f = array.shape[2] // size[0]
        blends = {output: Blend(tiles, size, factor=factor) for output, factor in outputs.items()}
        for y, x in tiles:
            part = array[:, :, f * y : f * (y + tiles.height), f * x : f * (x + tiles.width)]
            found = self._part({name: part}, {"H": tiles.height, "W": tiles.width}, finite=finite)
            for output, blend in blends.items():
                blend.add((y, x), found[output])
        return {output: blend.result() for output, blend in blends.items()}


class VaeDecoder(_Half):
    """The component ``vae_decoder``."""

    def images(self, latents: Array, *, tile: Tile = "auto", finite: bool = True) -> Array:
        """Latents float32 ``[N,C,h,w]`` in the bundle's scaling to images ``[N,3,H,W]`` in about [-1, 1].

        A tile sees nothing beyond its edges, and a KL decoder normalises by the mean and variance of what it sees:
        tiled pictures differ a little from whole ones, most where tiles are small. ``finite``: see ``Component``.
        """
        size = (latents.shape[2], latents.shape[3])
        return self._run("latent", latents, size, tile, {"image": self.factor}, finite=finite)["image"]


class VaeEncoder(_Half):
    """The component ``vae_encoder``."""

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
        found = self._run("image", pictures, size, tile, {"mean": 1, "std": 1})
        return found["mean"], found["std"]


def to_pixels(images_NCHW: Array) -> Pixels:
    """[-1, 1] to uint8 ``[N,H,W,C]``; what lies outside is clamped."""
    scaled = np.clip(np.rint((images_NCHW + np.float32(1)) * np.float32(127.5)), 0, 255)
    return np.ascontiguousarray(scaled.astype(np.uint8).transpose(0, 2, 3, 1))


class Vae:
    """Decoder and encoder of a bundle, as far as it has them.

    The decoder may have a device object of its own (``Device.with_own_stream``): then a chunk is decoded while the
    next one's steps run. Its latents come through the host, which has enqueued those steps before it waits for them.
    Not run on a GPU.
    """

    def __init__(self, manifest: Manifest, parts: Mapping[str, Component]) -> None:
        self._manifest = manifest
        self._decoder = VaeDecoder(decoder) if (decoder := parts.get(ComponentName.VAE_DECODER)) else None
        self.encoder = VaeEncoder(encoder) if (encoder := parts.get(ComponentName.VAE_ENCODER)) else None

    def check(self, tile: Tile, size: tuple[int, int] | None = None) -> None:
        """Raises ``BadInput`` for any ``tile`` in a bundle without a VAE.

        With the ``size`` of the latents to decode also ``OutOfProfile`` where the decoder can't take it.
        """
        if tile != "auto" and self._decoder is None and self.encoder is None:
            raise BadInput(
                f"tile = {tile!r} was given, and the bundle {self._manifest.name!r} has no VAE", hint="leave it out"
            )
        if size is not None and self._decoder is not None:
            self._decoder.check(size, tile)

    def latents(self, array: Any) -> Array:
        """A copy for ``decode`` and ``images``. Raises ``BadInput``."""
        return _checked(array, self._manifest.latent.channels, "latents")

    def pictures(self, array: Any) -> Array:
        """A copy for ``encode``. Raises ``BadInput``."""
        return _checked(array, 3, "pictures")

    def encoding(self, tile: Tile) -> Encode | None:
        """The encoder with this ``tile``, if the bundle has one."""
        return None if self.encoder is None else partial(self.encoder.encode, tile=tile)

    def decode(self, latents: Array, *, tile: Tile = "auto") -> NDArray[np.uint8]:
        """Latents float32 ``[N,C,h,w]`` to pictures uint8 ``[N,H,W,C]``. Raises ``Unavailable`` without a decoder."""
        return to_pixels(self.images(latents, tile=tile))

    def decode_each(self, latents: Array, *, tile: Tile = "auto") -> tuple[Pixels, NDArray[np.bool_]]:
        """``decode`` where some latents may be NaN, and which of the pictures are good; the others are black.

        The decoder gets zeros in place of such latents: the others' batch, and so their pictures, stay the same.
        """
        good: NDArray[np.bool_] = np.asarray(np.isfinite(latents).all(axis=(1, 2, 3)))
        images = self.images(np.where(good[:, None, None, None], latents, np.float32(0)), tile=tile, finite=False)
        good &= np.isfinite(images).all(axis=(1, 2, 3))
        images[~good] = -1
        return to_pixels(images), good

    def images(self, latents: Array, *, tile: Tile = "auto", finite: bool = True) -> Array:
        """Like ``decode``, as float32 ``[N,3,H,W]`` in about [-1, 1]."""
        with span("decode", images=len(latents)):
            return self._images(latents, tile, finite)

    def _images(self, latents: Array, tile: Tile, finite: bool) -> Array:
        manifest = self._manifest
        if manifest.decoder.kind == "pixel":
            found = latents / np.float32(manifest.latent.scaling) + np.float32(manifest.latent.shift)
            return np.asarray(found, np.float32)
        if self._decoder is None:
            raise Unavailable(
                f"the bundle {manifest.name!r} has no decoder: it gives latents, not pictures",
                hint="write the latents (--latents-out FILE.npy, or sample(decode=False)) and decode them yourself",
            )
        return self._decoder.images(latents, tile=tile, finite=finite)

    def encode(self, pictures: Array, *, tile: Tile = "auto") -> tuple[Array, Array]:
        """See ``VaeEncoder.encode``. Raises ``Unavailable`` without an encoder."""
        if self.encoder is None:
            raise Unavailable(
                f"the bundle {self._manifest.name!r} has no picture encoder",
                hint=f"build it from a whole pipeline folder, or with --part {ComponentName.VAE_ENCODER}=FOLDER",
            )
        return self.encoder.encode(pictures, tile=tile)


def _checked(array: Any, channels: int, what: str) -> Array:
    """A copy, float32 ``[N,channels,H,W]``. Raises ``BadInput``."""
    found: NDArray[Any] = read_array(array, what)
    if found.dtype.kind != "f" or found.ndim != 4 or found.shape[1] != channels or not found.size:
        got = f"{found.dtype}{list(found.shape)}" if found.dtype.kind in "biufc" else f"a {type(array).__name__}"
        raise BadInput(f"{what} are {got}; needed is float32[N, {channels}, H, W]", hint="give one entry per picture")
    return to_float32(found)
