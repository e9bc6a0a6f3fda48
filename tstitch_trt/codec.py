"""Between latents and pictures, as a bundle has it: its VAE, or none where the latents are the picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.errors import BadInput, Unavailable
from tstitch_trt.parts import Part
from tstitch_trt.pictures import LatentDecoder, PictureEncoder, Tile, to_pixels

__all__ = ["Codec", "Picturing"]

Array = NDArray[np.float32]


class Codec:
    """``encoder``: what makes latents of pictures, if the bundle has that part.

    A VAE's decoder may be on a device object of its own, beside the steps' (``Device.beside``): then a chunk is
    decoded while the next one's steps run. Its latents come through the host: they are small, and what waits for them
    is the host, which has enqueued those steps already. Not run on a GPU.
    """

    def __init__(self, manifest: Manifest, parts: Mapping[str, Part]) -> None:
        self._manifest = manifest
        self._decoder = LatentDecoder(parts["vae_decoder"]) if "vae_decoder" in parts else None
        self.encoder = PictureEncoder(parts["vae_encoder"]) if "vae_encoder" in parts else None

    def check(self, tile: Tile, size: tuple[int, int] | None = None) -> None:
        """Raises ``BadInput`` for tiles that can't be, and where there is no VAE to take any.

        With the ``size`` of latents that are to be decoded also ``OutOfProfile`` for one that the decoder can't take.
        """
        number = isinstance(tile, int) and not isinstance(tile, bool) and tile > 0
        if not number and tile not in ("auto", "off"):
            raise BadInput(
                f"tile = {tile!r}; allowed are 'auto', 'off' and a number of pixels", hint="e.g. tile=512, or 'auto'"
            )
        if tile != "auto" and self._decoder is None and self.encoder is None:
            raise BadInput(
                f"tile = {tile!r} was given, and the bundle {self._manifest.name!r} has no VAE", hint="leave it out"
            )
        if size is not None and self._decoder is not None:
            self._decoder.check(size, tile)

    def encoding(self, tile: Tile) -> _Encoding | None:
        """What makes latents of pictures, if the bundle has that part."""
        return None if self.encoder is None else _Encoding(self.encoder, tile)

    def decode(self, latents: Array, *, tile: Tile = "auto") -> NDArray[np.uint8]:
        """Latents float32 ``[N,C,h,w]`` to pictures uint8 ``[N,H,W,C]``. Raises ``Unavailable`` without a decoder."""
        return to_pixels(self.images(latents, tile=tile))

    def images(self, latents: Array, *, tile: Tile = "auto") -> Array:
        """Like ``decode``, as float32 ``[N,3,H,W]`` in about [-1, 1]."""
        manifest = self._manifest
        if manifest.decoder.kind == "pixel":
            found = latents / np.float32(manifest.latent.scaling) + np.float32(manifest.latent.shift)
            return np.asarray(found, np.float32)
        if self._decoder is None:
            raise Unavailable(
                f"the bundle {manifest.name!r} has no decoder: it gives latents, not pictures",
                hint="write the latents (--latents-out FILE.npy, or sample(decode=False)) and decode them yourself",
            )
        return self._decoder.images(latents, tile=tile)

    def encode(self, pictures: Array, *, tile: Tile = "auto") -> tuple[Array, Array]:
        """Pictures float32 ``[N,3,H,W]`` in [-1, 1] to mean and standard deviation of their latents ``[N,C,h,w]``.

        Raises ``Unavailable`` without an encoder.
        """
        if self.encoder is None:
            raise Unavailable(
                f"the bundle {self._manifest.name!r} has no picture encoder",
                hint="build it from a whole pipeline folder, or with --part vae_encoder=FOLDER",
            )
        return self.encoder.encode(pictures, tile=tile)


@dataclass(frozen=True)
class _Encoding:
    """A ``starting.Encoder``."""

    encoder: PictureEncoder
    tile: Tile

    def encode(self, pictures: Array) -> tuple[Array, Array]:
        return self.encoder.encode(pictures, tile=self.tile)


class Picturing:
    """The verbs of a runtime between latents and pictures. ``tile``: see ``tstitch_trt.pictures.Tile``."""

    _codec: Codec

    def decode(self, latents: Array, *, tile: Tile = "auto") -> NDArray[np.uint8]:
        """Latents float32 ``[N,C,H,W]`` to pictures uint8 ``[N,H,W,C]``. Raises ``Unavailable`` without a decoder."""
        return self._codec.decode(latents, tile=tile)

    def images(self, latents: Array, *, tile: Tile = "auto") -> Array:
        """Like ``decode``, as float32 ``[N,C,H,W]`` in about [-1, 1], neither clamped nor rounded."""
        return self._codec.images(latents, tile=tile)

    def encode(self, pictures: Array, *, tile: Tile = "auto") -> tuple[Array, Array]:
        """Pictures float32 ``[N,3,H,W]`` in [-1, 1] to mean and standard deviation of their latents ``[N,C,h,w]``.

        Raises ``Unavailable`` without an encoder.
        """
        return self._codec.encode(pictures, tile=tile)
