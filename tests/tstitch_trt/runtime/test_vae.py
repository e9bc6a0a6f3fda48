"""Pictures through the VAE's engines, whole and in tiles, and picture files as diffusers prepares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from support.compare import relative_error
from support.compiled_parts import export_network, load_part
from support.manifests import manifest
from support.tiny_families import kl_folder
from tstitch_engines.bundle.manifest import Latent
from tstitch_engines.errors import BadInput, OutOfProfile
from tstitch_engines.spec import Range
from tstitch_export.families import open_family
from tstitch_trt.images.read import read_mask, read_picture
from tstitch_trt.request.init_image import make_init_image
from tstitch_trt.request.parse import InitOptions
from tstitch_trt.runtime.vae import Vae, VaeDecoder, VaeEncoder, to_pixels

SCALING, SHIFT = 0.13025, 0.1
PROFILE = {"B": Range(1, 1, 2), "H": Range(4, 16, 16), "W": Range(4, 16, 16)}


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, VaeDecoder, VaeEncoder]:
    """A tiny KL autoencoder, two pixels per latent element, engines of at most 2x16x16 latents."""
    folder = tmp_path_factory.mktemp("vae")
    model = kl_folder(folder / "vae")
    parts = []
    for name in ("vae-decoder", "vae-encoder"):
        family = open_family(name)
        network = export_network(name, folder / "vae", folder / name)
        parts.append(load_part(family.role, network, folder / name, PROFILE))
    return model, VaeDecoder(parts[0]), VaeEncoder(parts[1])


def latents(count: int, height: int, width: int) -> Any:
    return np.random.default_rng(height).standard_normal((count, 4, height, width)).astype(np.float32)


def test_decode_as_diffusers(vae: Any) -> None:
    """Three latents in calls of at most two; uint8 as VaeImageProcessor makes it."""
    from diffusers.image_processor import VaeImageProcessor

    model, decoder, _ = vae
    x = latents(3, 9, 16)
    with torch.inference_mode():
        want = model.decode(torch.from_numpy(x) / SCALING + SHIFT).sample
    images = decoder.images(x, tile="off")
    assert np.abs(images - want.numpy()).max() <= 1e-4 * want.abs().max()
    theirs = VaeImageProcessor.pt_to_numpy(VaeImageProcessor.denormalize(want))
    got = to_pixels(decoder.images(x))
    assert got.shape == (3, 18, 32, 3)
    # Rounding differs where a value lies between two: (x / 2 + 0.5) 255 against (x + 1) 127.5
    assert np.abs(got.astype(int) - np.round(theirs * 255).astype(int)).max() <= 1
    assert (got != np.round(theirs * 255)).mean() < 1e-3


def test_tiles_resemble_the_whole(vae: Any) -> None:
    """Tiles differ from the whole by what they don't see: group norms over the tile, and its edges.

    The whole is diffusers' own. The random decoder has pictures of about unit size; its two effects are a few per cent
    of that on average, far below what a seam or a misplaced tile would give (the last lines show one).
    """
    model, decoder, _ = vae
    x = latents(1, 24, 40)
    with torch.inference_mode():
        whole = model.decode(torch.from_numpy(x) / SCALING + SHIFT).sample.numpy()
    tiled = decoder.images(x)
    assert tiled.shape == whole.shape == (1, 3, 48, 80)

    def distance(a: Any, b: Any) -> float:
        return float(np.linalg.norm(a - b) / np.linalg.norm(b - b.mean()))

    assert 0 < distance(tiled, whole) < 0.2
    assert distance(np.roll(tiled, 2, axis=3), whole) > 0.5
    with torch.inference_mode():  # tiles at other places, cut by a ramp as well: as far from the whole as ours
        model.enable_tiling()
        model.tile_sample_min_size, model.tile_latent_min_size = 32, 16
        theirs = model.decode(torch.from_numpy(x) / SCALING + SHIFT).sample.numpy()
        model.disable_tiling()
    assert distance(tiled, whole) < 2 * distance(theirs, whole) + 1e-3


def test_tiled_encoding_resembles_the_whole(vae: Any) -> None:
    model, _, encoder = vae
    image = np.random.default_rng(0).uniform(-1, 1, (1, 3, 48, 64)).astype(np.float32)
    with torch.inference_mode():
        posterior = model.encode(torch.from_numpy(image)).latent_dist
    mean, std = encoder.encode(image)
    for got, want in ((mean, (posterior.mean.numpy() - SHIFT) * SCALING), (std, posterior.std.numpy() * SCALING)):
        assert relative_error(got, want) < 0.2
    small = image[:, :, :20, :32]
    mean, std = encoder.encode(small, tile="off")
    with torch.inference_mode():
        posterior = model.encode(torch.from_numpy(small)).latent_dist
    assert np.abs(mean - (posterior.mean.numpy() - SHIFT) * SCALING).max() < 1e-4
    assert np.abs(std - posterior.std.numpy() * SCALING).max() < 1e-4


def test_sizes_outside_the_profile(vae: Any) -> None:
    _, decoder, encoder = vae
    with pytest.raises(OutOfProfile, match="width 40 is outside its profile; allowed is 8 to 32 pixels") as caught:
        decoder.images(latents(1, 16, 20), tile="off")
    assert "tile='auto'" in caught.value.hint
    with pytest.raises(OutOfProfile, match="height 6 is outside its profile") as caught:
        decoder.images(latents(1, 3, 16))
    assert "--height" in caught.value.hint
    with pytest.raises(BadInput, match="tiles of 64 pixels; vae_decoder takes 8 to 32, in steps of 2"):
        decoder.images(latents(1, 16, 16), tile=64)
    with pytest.raises(BadInput, match="tiles of 15 pixels"):
        decoder.images(latents(1, 16, 16), tile=15)
    assert decoder.images(latents(1, 16, 16), tile=16).shape == (1, 3, 32, 32)
    with pytest.raises(BadInput, match="the picture is 33x32 pixels; both must be multiples of 2") as caught:
        encoder.encode(np.zeros((1, 3, 32, 33), np.float32))
    assert "32x32" in caught.value.hint


def test_pixels_are_clamped_and_rounded() -> None:
    values = np.array([-3.0, -1.0, 0.0, 1.0, 7.0], np.float32).reshape(1, 1, 1, 5)
    assert to_pixels(values).ravel().tolist() == [0, 0, 128, 255, 255]


def test_latents_that_are_pixels_are_scaled_and_shifted() -> None:
    """The picture is ``latent / scaling + shift``, and one to start from goes the other way."""
    bundle = manifest(latent=Latent(channels=3, height=5, width=4, scaling=0.5, shift=0.25))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    latents = ((pictures / 127.5 - 1 - 0.25) * 0.5).transpose(0, 3, 1, 2).astype(np.float32)
    np.testing.assert_array_equal(Vae(bundle, {}).decode(latents), pictures)
    made = make_init_image(bundle, None, InitOptions(pictures, None, None, 1.0), (1, 2), (3, 5, 4), None)
    np.testing.assert_allclose(made.clean, latents, atol=1e-6)


# --- files


def coloured(width: int, height: int) -> Any:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))


def test_pictures_as_diffusers_prepares_them(tmp_path: Path) -> None:
    from diffusers.image_processor import VaeImageProcessor

    picture = coloured(50, 40)
    picture.save(tmp_path / "a.png")
    want = VaeImageProcessor(vae_scale_factor=8).preprocess(picture, height=64, width=48).numpy()
    got = read_picture(tmp_path / "a.png", size=(64, 48), resize=True)
    assert np.abs(got.transpose(2, 0, 1) / 127.5 - 1 - want[0]).max() < 1e-6
    assert np.array_equal(read_picture(tmp_path / "a.png"), np.asarray(picture))


@pytest.mark.parametrize("resize", [False, True])
def test_masks_as_diffusers_prepares_them(tmp_path: Path, resize: bool) -> None:
    """Greyed, resized, cut at the half, and every eighth pixel of it for the latent."""
    from diffusers.image_processor import VaeImageProcessor

    picture = coloured(40, 56) if resize else coloured(48, 64)
    picture.save(tmp_path / "m.png")
    processor = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    want = processor.preprocess(picture, height=64, width=48)
    got = (read_mask(tmp_path / "m.png", size=(64, 48), resize=resize) >= 128).astype(np.float32)
    assert np.array_equal(got, want.numpy()[0, 0])
    small = torch.nn.functional.interpolate(want, size=(8, 6))
    assert np.array_equal(got[::8, ::8], small.numpy()[0, 0])


def test_files_are_turned_upright_and_lose_transparency(tmp_path: Path) -> None:
    picture = coloured(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    picture.save(tmp_path / "side.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "side.png"), np.rot90(np.asarray(picture), -1))
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 255, 255))
    clear.save(tmp_path / "clear.png")
    pixels = read_picture(tmp_path / "clear.png")
    assert pixels[0, 0].tolist() == [0, 0, 255]
    assert (pixels[1] == 255).all()


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    coloured(50, 40).save(tmp_path / "a.png")
    with pytest.raises(BadInput, match=r"image .*a\.png is 50x40 pixels; needed is 48x64") as caught:
        read_picture(tmp_path / "a.png", size=(64, 48))
    assert "--size 50x40" in caught.value.hint
    with pytest.raises(BadInput, match=r"mask .*a\.png is 50x40 pixels"):
        read_mask(tmp_path / "a.png", size=(64, 48))
    with pytest.raises(BadInput, match=r"control .*none\.png does not exist"):
        read_picture(tmp_path / "none.png", what="control")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(BadInput, match="no picture that can be read"):
        read_picture(tmp_path / "text.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match="can't be read"):
        read_picture(tmp_path / "half.png")
