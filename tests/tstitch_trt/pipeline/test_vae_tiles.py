"""A VAE in tiles as ``vae.enable_tiling()`` has it: the engines' pictures and latents are the pipeline's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from support.accelerating import LIMIT, SD, fast, pictures, pipeline, seeded
from support.compare import relative_error
from support.tiny_families import vae_folder
from tstitch_engines.errors import BadInput, OutOfProfile
from tstitch_trt.pipeline.vae_tiles import decode_images, encode_pictures

pytestmark = [
    # diffusers hands numpy its tensors in a way that newer versions of numpy warn of
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You have passed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`tiled_encode`|The tiled_encode:FutureWarning"),
]


class OnTorch:
    """The runtime's two methods, on the module itself and without its tiles."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    def images(self, latents: np.ndarray, *, tile: str = "auto") -> np.ndarray:
        return self._whole(lambda: self.vae.decode(torch.from_numpy(latents)).sample)[0]

    def encode(self, given: np.ndarray, *, tile: str = "auto") -> tuple[np.ndarray, np.ndarray]:
        def run() -> Any:
            found = self.vae.encode(torch.from_numpy(given)).latent_dist
            return torch.cat([found.mean, found.std])

        mean, std = np.split(self._whole(run)[0], 2)
        return mean, std

    def _whole(self, run: Any) -> list[np.ndarray]:
        self.vae.disable_tiling()
        with torch.no_grad():
            found = run().numpy()
        self.vae.enable_tiling()
        return [found]


@pytest.mark.parametrize("size", [(12, 7), (4, 9), (3, 3)])
@pytest.mark.parametrize("overlap", [0.25, 0.0])
def test_tiles_are_cut_and_blended_as_by_diffusers(tmp_path: Path, size: tuple[int, int], overlap: float) -> None:
    """Of any size and overlap, also where tiles at the edges are narrower than the overlap."""
    vae = vae_folder(tmp_path / "vae", levels=2)
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size, vae.tile_overlap_factor = 4, 8, overlap
    latents = torch.randn(2, 4, *size, generator=seeded(1))
    shown = torch.randn(2, 3, 2 * size[0], 2 * size[1], generator=seeded(2))
    with torch.no_grad():
        image = vae.decode(latents).sample.numpy()
        moments = vae.encode(shown).latent_dist
    runtime: Any = OnTorch(vae)
    compiled = torch.compile(vae, backend="eager")
    for own in (vae, compiled):
        assert relative_error(decode_images(runtime, own, latents.numpy()), image) < 1e-5
    mean, std = encode_pictures(runtime, vae, shown.numpy())
    assert relative_error(mean, moments.mean.numpy()) < 1e-5
    assert relative_error(std, moments.std.numpy()) < 1e-5


def test_another_way_of_tiling_is_refused(tmp_path: Path) -> None:
    vae = vae_folder(tmp_path / "vae", "tiny")
    vae.enable_tiling()
    vae.tile_latent_min_size = 8
    runtime: Any = SimpleNamespace(images=lambda latents: latents)
    assert decode_images(runtime, vae, np.zeros((1, 4, 7, 7), np.float32)).shape == (1, 4, 7, 7)  # one tile is whole
    with pytest.raises(BadInput, match="the pipeline's vae is an AutoencoderTiny with tiling on"):
        decode_images(runtime, vae, np.zeros((1, 4, 8, 8), np.float32))


def test_a_tiled_pipeline_draws_its_own_pictures(sd: Path, tmp_path: Path) -> None:
    """From a picture to a picture: both halves of the VAE run in tiles, and tiling may be switched at any time."""
    pipe = pipeline(sd, "ddim", "StableDiffusionImg2ImgPipeline")
    asked = {**SD, "image": pictures(1)[0], "strength": 0.5, "output_type": "np"}
    with fast(pipe, sd, tmp_path, height="16:64:64", width="16:64:64") as made:
        whole = made(**asked, generator=seeded(1), fraction=0.0).images
        pipe.vae.enable_tiling()
        pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 32
        want = pipe(**asked, generator=seeded(1)).images
        got = made(**asked, generator=seeded(1), fraction=0.0).images
        assert relative_error(got, want) < LIMIT
        assert relative_error(whole, want) > 10 * LIMIT
        pipe.vae.tile_overlap_factor = 0.125  # leaves 8 pixels for the last tile
        with pytest.raises(OutOfProfile, match="a tile of the pipeline's vae: ") as caught:
            made(**asked, generator=seeded(1), fraction=0.0)
        assert 'width="MIN:OPT:MAX"' in caught.value.hint
        assert "pipe.vae.disable_tiling()" in caught.value.hint
