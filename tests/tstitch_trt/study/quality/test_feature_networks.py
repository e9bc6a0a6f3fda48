"""Feature networks as users have them: what each is given, and what of its answer is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from support.networks import means_network
from tstitch_engines.errors import BadInput, UnknownName
from tstitch_trt.study.quality.gaussian import gaussian_of
from tstitch_trt.study.quality.network import FeatureNetwork, NetworkOptions
from tstitch_trt.study.quality.pairs import Lpips
from tstitch_trt.study.quality.real_images import read_reference

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), np.uint8)


def script(folder: Path, module: nn.Module, name: str = "net.pt") -> Path:
    torch.jit.script(module).save(str(folder / name))
    return folder / name


def onnx_file(folder: Path, module: nn.Module, *example: torch.Tensor, name: str = "net.onnx", **options: Any) -> Path:
    from tstitch_engines.quiet import silence_output

    with silence_output():
        torch.onnx.export(module, example, str(folder / name), dynamo=False, **options)
    return folder / name


class Means(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


class Inception(nn.Module):
    """As inception-2015-12-05.pt is called: bytes in, its own resizing, features on request."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        features = img.mean((2, 3))
        return features if return_features else features.sum(1, keepdim=True)


class Both(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        means = x.mean((2, 3))
        return {"logits": -means, "pool": means[:, :, None, None], "map": x}


def test_torchscript_is_given_pictures_in_minus_one_to_one(tmp_path: Path) -> None:
    network = FeatureNetwork(script(tmp_path, Means()))
    features, logits = network.extract(IMAGES)
    np.testing.assert_allclose(features, (IMAGES / 127.5 - 1).mean((1, 2)), atol=1e-6)
    assert logits is None
    assert not network.classifies


@pytest.mark.parametrize(("values", "scale", "shift"), [("0:1", 1 / 255, 0), ("0:255", 1, 0), ("-1:1", 1 / 127.5, -1)])
def test_the_range_is_an_option(tmp_path: Path, values: str, scale: float, shift: float) -> None:
    network = FeatureNetwork(script(tmp_path, Means()), options=NetworkOptions.parse({"range": values}))
    np.testing.assert_allclose(network.extract(IMAGES)[0], (IMAGES * scale + shift).mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_inception_in_its_common_form_is_known_by_its_signature(tmp_path: Path) -> None:
    """0..255, grey repeated to three channels, in the pictures' own size, with return_features=True."""
    network = FeatureNetwork(script(tmp_path, Inception()))
    np.testing.assert_allclose(network.extract(IMAGES)[0], IMAGES.mean((1, 2)), rtol=1e-5)
    grey = IMAGES[..., :1]
    np.testing.assert_allclose(network.extract(grey)[0], grey.mean((1, 2)).repeat(3, axis=1), rtol=1e-5)


def test_a_network_of_a_fixed_size_gets_pictures_resized_as_pillow_does(tmp_path: Path) -> None:
    class Flat(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

    path = onnx_file(tmp_path, Flat(), torch.zeros(2, 3, 3, 5), dynamic_axes={"x": {0: "N"}}, input_names=["x"])
    network = FeatureNetwork(path)
    assert network.size == (3, 5)
    found = network.extract(IMAGES[..., :1])[0].reshape(5, 3, 3, 5)
    plane = Image.fromarray(IMAGES[2, ..., 0].astype(np.float32)).resize((5, 3), Image.Resampling.BICUBIC)
    want = np.asarray(plane) / 127.5 - 1
    for channel in range(3):
        np.testing.assert_allclose(found[2, channel], want, atol=1e-5)


def test_a_size_that_the_file_does_not_say_is_an_option(tmp_path: Path) -> None:
    class Sides(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full((x.shape[0], 2), float(x.shape[2] * x.shape[3]))

    network = FeatureNetwork(script(tmp_path, Sides()), options=NetworkOptions.parse({"size": "7", "channels": "3"}))
    assert network.extract(IMAGES)[0].tolist() == [[49.0, 49.0]] * 5


def test_a_network_of_bytes_gets_bytes(tmp_path: Path) -> None:
    class Bytes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().mean((2, 3))

    path = onnx_file(
        tmp_path, Bytes(), torch.zeros(1, 3, 6, 4, dtype=torch.uint8), dynamic_axes={"x": {0: "N"}}, input_names=["x"]
    )
    np.testing.assert_allclose(FeatureNetwork(path).extract(IMAGES)[0], IMAGES.mean((1, 2)), rtol=1e-5)


def test_outputs_are_picked_by_name_or_number(tmp_path: Path) -> None:
    path = onnx_file(
        tmp_path, Both(), torch.zeros(1, 3, 6, 4), dynamic_axes={"x": {0: "N"}}, input_names=["x"],
        output_names=["logits", "pool", "map"],
    )  # fmt: skip
    means = (IMAGES / 127.5 - 1).mean((1, 2))
    for wanted in ("pool", "1"):
        features, logits = FeatureNetwork(path, options=NetworkOptions(output=wanted)).extract(IMAGES)
        np.testing.assert_allclose(features, means, atol=1e-6)
        np.testing.assert_allclose(logits, -means, atol=1e-6)
    with pytest.raises(UnknownName, match="known: logits, pool, map"):
        FeatureNetwork(path, options=NetworkOptions(output="pol")).extract(IMAGES)
    with pytest.raises(BadInput, match=r"gives \[5, 3, 6, 4\]"):
        FeatureNetwork(path, options=NetworkOptions(output="map")).extract(IMAGES)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [({"siez": "3"}, "'size'"), ({"range": "0:2"}, "range"), ({"channels": "2"}, "1 or 3"), ({"size": "x"}, "size")],
)
def test_wrong_options_are_refused(pairs: dict[str, str], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        NetworkOptions.parse(pairs)


def test_files_that_are_no_networks_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(BadInput, match="can't be read as TorchScript") as caught:
        FeatureNetwork(tmp_path / "weights.pth")
    assert "weights alone is no network" in caught.value.hint
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(BadInput, match="can't be read as ONNX"):
        FeatureNetwork(tmp_path / "broken.onnx")
    with pytest.raises(BadInput, match="does not exist"):
        FeatureNetwork(tmp_path / "none.pt")


def test_colour_for_a_grey_network_is_refused(tmp_path: Path) -> None:
    network = FeatureNetwork(means_network(tmp_path, channels=1)[0])
    with pytest.raises(BadInput, match="takes 1 channel, the pictures have 3"):
        network.extract(IMAGES)


def test_nan_is_refused(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)) * float("nan")

    with pytest.raises(BadInput, match="NaN"):
        FeatureNetwork(script(tmp_path, Broken())).extract(IMAGES)


# --- references


def test_a_reference_of_pictures_is_looked_at_by_the_network(tmp_path: Path) -> None:
    network = FeatureNetwork(script(tmp_path, Means()))
    np.savez(tmp_path / "real.npz", IMAGES)
    found = read_reference(tmp_path / "real.npz", network, picture=(6, 4, 3))
    want = gaussian_of(network.extract(IMAGES)[0])
    assert found.count == 5
    np.testing.assert_allclose(found.gaussian.covariance, want.covariance)
    np.testing.assert_allclose(found.require_features("kid"), network.extract(IMAGES)[0])


def test_the_features_of_a_reference_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block, so that no picture is looked at twice; another network begins anew."""
    monkeypatch.setattr("tstitch_trt.study.quality.real_images._BLOCK", 2)
    network = FeatureNetwork(script(tmp_path, Means()))
    np.savez(tmp_path / "real.npz", IMAGES)
    wanted: dict[str, Any] = {"picture": (6, 4, 3), "cache": tmp_path / "cache"}
    first = read_reference(tmp_path / "real.npz", network, **wanted)
    blocks = sorted((tmp_path / "cache").rglob("*.npy"))
    assert len(blocks) == 3
    times = [block.stat().st_mtime_ns for block in blocks[:2]]
    blocks[2].unlink()
    again = read_reference(tmp_path / "real.npz", network, **wanted)
    np.testing.assert_array_equal(again.require_features("kid"), first.require_features("kid"))
    np.testing.assert_array_equal(first.require_features("kid"), network.extract(IMAGES)[0])
    assert [block.stat().st_mtime_ns for block in blocks[:2]] == times
    other = FeatureNetwork(tmp_path / "net.pt", options=NetworkOptions(range="0:1"))
    read_reference(tmp_path / "real.npz", other, **wanted)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 6


def test_statistics_beside_pictures_are_used_where_they_are_of_this_network(tmp_path: Path) -> None:
    network = FeatureNetwork(script(tmp_path, Means()))
    many = np.random.default_rng(1).integers(0, 256, (300, 6, 4, 3), np.uint8)
    whole = gaussian_of(network.extract(many)[0])
    for shift, want in ((0, whole), (5, gaussian_of(network.extract(many[:100])[0]))):
        np.savez(tmp_path / "adm.npz", arr_0=many[:100], mu=whole.mean + shift, sigma=whole.covariance)
        found = read_reference(tmp_path / "adm.npz", network, picture=(6, 4, 3))
        np.testing.assert_allclose(found.gaussian.mean, want.mean)


def test_statistics_alone_know_no_single_pictures(tmp_path: Path) -> None:
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3), sigma=np.eye(3))
    found = read_reference(tmp_path / "adm.npz", FeatureNetwork(script(tmp_path, Means())), picture=(6, 4, 3))
    assert found.width == 3
    with pytest.raises(BadInput, match="kid needs the features of real pictures one by one"):
        found.require_features("kid")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"arr_0": np.zeros((4, 8, 4, 3), np.uint8)}, "8x4x3 .*the bundle draws 6x4x3"),
        ({"arr_0": np.zeros((4, 6, 4, 1), np.uint8)}, "6x4x1 .*the bundle draws 6x4x3"),
        ({"arr_0": np.zeros((4, 6, 4, 3), np.float32)}, r"arr_0 .*float32\[4, 6, 4, 3\].*uint8"),
        ({"images": np.zeros((4, 6, 4, 3), np.uint8)}, "holds images; allowed are arr_0"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu \[3\] and sigma \[4, 4\]"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "finite"),
    ],
)
def test_what_is_no_reference_for_these_pictures_is_refused(tmp_path: Path, arrays: Any, words: str) -> None:
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(BadInput, match=words):
        read_reference(tmp_path / "r.npz", FeatureNetwork(script(tmp_path, Means())), picture=(6, 4, 3))


def test_a_reference_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    network = FeatureNetwork(script(tmp_path, Means()))
    with pytest.raises(BadInput, match="does not exist"):
        read_reference(tmp_path / "none.npz", network, picture=None)
    (tmp_path / "r.npz").write_bytes(b"nothing")
    with pytest.raises(BadInput, match="can't be read"):
        read_reference(tmp_path / "r.npz", network, picture=None)
    np.save(tmp_path / "r.npy", IMAGES)
    with pytest.raises(BadInput, match="can't be read"):
        read_reference(tmp_path / "r.npy", network, picture=None)


# --- LPIPS


class Distance(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().mean((1, 2, 3), keepdim=True)


def test_lpips_takes_two_batches_in_minus_one_to_one(tmp_path: Path) -> None:
    other = IMAGES[::-1]
    want = np.abs(IMAGES / 127.5 - other / 127.5).mean((1, 2, 3))
    axes = {"a": {0: "N"}, "b": {0: "N"}}
    example = (torch.zeros(2, 3, 6, 4), torch.zeros(2, 3, 6, 4))
    onnx = onnx_file(tmp_path, Distance(), *example, input_names=["a", "b"], dynamic_axes=axes)
    for path in (script(tmp_path, Distance()), onnx):
        np.testing.assert_allclose(Lpips(path)(IMAGES, other), want, rtol=1e-5)
    grey = Lpips(script(tmp_path, Distance()))(IMAGES[..., :1], other[..., :1])
    np.testing.assert_allclose(grey, np.abs(IMAGES / 127.5 - other / 127.5)[..., 0].mean((1, 2)), rtol=1e-5)


def test_a_network_of_one_input_or_one_answer_is_no_lpips(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="takes 1 input"):
        Lpips(script(tmp_path, Means()))

    class Mean(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a - b).abs().mean()

    with pytest.raises(BadInput, match="for 5 pairs"):
        Lpips(script(tmp_path, Mean(), "mean.pt"))(IMAGES, IMAGES)
