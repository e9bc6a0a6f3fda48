"""Between latents and pictures, as a bundle has it: its VAE, or none where the latents are the picture."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tstitch_engines.errors import Unavailable
from tstitch_engines.manifest import Manifest
from tstitch_trt.parts import Part
from tstitch_trt.pictures import LatentDecoder, PictureEncoder, Tile, to_pixels

__all__ = ["Codec"]


class Codec:
    """``encoder``: what makes latents of pictures, if the bundle has that part."""

    def __init__(self, manifest: Manifest, parts: Mapping[str, Part]) -> None:
        self._manifest = manifest
        self._decoder = LatentDecoder(parts["vae_decoder"]) if "vae_decoder" in parts else None
        self.encoder = PictureEncoder(parts["vae_encoder"]) if "vae_encoder" in parts else None

    def decode(self, latents: NDArray[np.float32], *, tile: Tile = "auto") -> NDArray[np.uint8]:
        """Latents float32 ``[N,C,h,w]`` to pictures uint8 ``[N,H,W,C]``. Raises ``Unavailable`` without a decoder.

        A VAE's engine runs in the order of the device's work, behind the steps that are enqueued already: it may share
        their activation memory.
        """
        return to_pixels(self.images(latents, tile=tile))

    def images(self, latents: NDArray[np.float32], *, tile: Tile = "auto") -> NDArray[np.float32]:
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

    def encode(self, pictures: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Pictures float32 ``[N,3,H,W]`` in [-1, 1] to mean and standard deviation of their latents ``[N,C,h,w]``.

        Raises ``Unavailable`` without an encoder.
        """
        if self.encoder is None:
            raise Unavailable(
                f"the bundle {self._manifest.name!r} has no picture encoder",
                hint="build it from a whole pipeline folder, or with --part vae_encoder=FOLDER",
            )
        return self.encoder.encode(pictures)
