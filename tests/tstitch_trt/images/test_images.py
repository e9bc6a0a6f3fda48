from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.pictures import read_metadata
from tstitch_engines.errors import BadInput
from tstitch_trt.files import atomic_file, load_array, save_array
from tstitch_trt.images.grid import grid, labelled_rows, save_npz, save_png
from tstitch_trt.images.write import kind_of, write_images


def pictures(count: int, channels: int = 3, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_every_image_in_reading_order(channels: int) -> None:
    images = pictures(5, channels)
    sheet = np.asarray(grid(images, columns=3, gap=2, scale=2))
    assert sheet.shape[:2] == (2 * 16 + 2, 3 * 16 + 2 * 2)
    for index, image in enumerate(images):
        y, x = index // 3 * 18, index % 3 * 18
        cell = sheet[y : y + 16 : 2, x : x + 16 : 2]
        np.testing.assert_array_equal(cell if channels == 3 else cell[..., None], image)
    assert (sheet[18:34, 36:52] == 255).all()  # the empty sixth place


def test_png_text_and_pixels_come_back(tmp_path: Path) -> None:
    images = pictures(1)
    save_png(tmp_path / "a.png", grid(images), {"settings": '{"name": "Fréchet"}', "Software": "x"})
    assert read_metadata(tmp_path / "a.png")["settings"] == '{"name": "Fréchet"}'
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), images[0])


def test_npz_is_what_adm_evaluators_read(tmp_path: Path) -> None:
    images = pictures(4)
    save_npz(tmp_path / "a.npz", images)
    with np.load(tmp_path / "a.npz") as stored:
        assert stored.files == ["arr_0"]
        assert stored["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(stored["arr_0"], images)


def test_labelled_rows_show_text_beside_unscaled_pixels() -> None:
    rows = [("fraction 0\n12 ms", pictures(3, 1)), ("fraction 1", pictures(3, 1))]
    image = np.asarray(labelled_rows(rows, heads=("a", "Ankle boot", "c"), scale=4))
    for _, images in rows:  # each row's first image is found somewhere, pixel for pixel
        want = images[0, :, :, 0].repeat(4, 0).repeat(4, 1)
        windows = np.lib.stride_tricks.sliding_window_view(image[..., 0], want.shape)
        corners = np.argwhere(windows[:, :, 0, 0] == want[0, 0])
        assert any((windows[y, x] == want).all() for y, x in corners)
    assert (image[:, :60] < 128).any()  # the text is there


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    save_array(path, np.arange(3))

    def write_half() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]
    np.testing.assert_array_equal(load_array(path, option="--latents-in"), np.arange(3))


def test_a_folder_gets_one_png_per_image_and_keeps_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    images = pictures(3)
    each = [{"seed": i} for i in range(3)]
    assert [p.name for p in write_images(folder, images, {"steps": 2}, each)] == ["00000.png", "00001.png", "00002.png"]
    (folder / "mine.txt").write_text("kept")
    write_images(folder, images[::-1], {"steps": 2}, each)
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "00000.png")), images[2])
    assert '"seed": 2' in read_metadata(folder / "00002.png")["tstitch-trt"]
    assert (folder / "mine.txt").read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "png"), ("a.PNG", "png"), ("a.npz", "npz"), ("a", "folder"), (".", "folder")]
)
def test_the_kind_of_output_follows_the_suffix(tmp_path: Path, name: str, kind: str) -> None:
    assert kind_of(tmp_path / name) == kind


@pytest.mark.parametrize(
    ("name", "says", "hint"), [("a.jpg", ".npz", "a.png"), ("no/a.png", "does not exist", "mkdir -p")]
)
def test_a_wrong_output_says_what_is_allowed(tmp_path: Path, name: str, says: str, hint: str) -> None:
    with pytest.raises(BadInput) as caught:
        kind_of(tmp_path / name)
    assert says in caught.value.message
    assert hint in caught.value.hint


def test_only_plain_arrays_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(2))
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object))
    (tmp_path / "t.npy").write_bytes(b"\x93NUMPY")
    for name in ("a.npz", "o.npy", "t.npy", "missing.npy"):
        with pytest.raises(BadInput, match=name):
            load_array(tmp_path / name, option="--latents-in")


def test_pictures_of_prompts_say_so_in_words(tmp_path: Path) -> None:
    settings = {
        "bundle": "sd15.bundle",
        "steps": 50,
        "solver": "pndm",
        "schedule": {"text": "small:0.4,large", "members": []},
        "guidance": {"small": [7.5], "large": [7.5]},
        "negative": "blurry",
    }
    each = [{"prompt": "a café, at night", "seed": 4}, {"prompt": "猫", "seed": 5}]
    write_images(tmp_path / "out", pictures(2), settings, each)
    height, width = pictures(1).shape[1:3]
    rest = f"Size: {width}x{height}, Model: sd15.bundle, Version: tstitch-trt"
    assert read_metadata(tmp_path / "out/00000.png")["parameters"].splitlines() == [
        "a café, at night",
        "Negative prompt: blurry",
        f'Steps: 50, Sampler: pndm, Schedule: "small:0.4,large", CFG scale: 7.5, Seed: 4, {rest}',
    ]
    other = settings | {"guidance": {"small": [1.0], "large": [7.5, 5.0]}}
    write_images(tmp_path / "grid.png", pictures(2), other, each)
    text = read_metadata(tmp_path / "grid.png")["parameters"].splitlines()
    assert text[:2] == ["a café, at night", "猫"]
    assert 'CFG scale: "small 1, large 7.5/5", Seed: "4, 5"' in text[3]
    write_images(tmp_path / "classes.png", pictures(1), {"steps": 2}, [{"label": 3, "seed": 0}])
    assert "parameters" not in read_metadata(tmp_path / "classes.png")
