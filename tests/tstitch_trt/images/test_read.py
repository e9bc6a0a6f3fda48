"""Pictures from files: their whole range, their bounds, and files made to break whoever reads them."""

from __future__ import annotations

import io
import os
import struct
import time
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tstitch_engines.errors import BadInput
from tstitch_trt.images import read
from tstitch_trt.images.read import read_control, read_mask, read_picture

RAMP = np.linspace(0, 1, 48).reshape(6, 8)  # black to white


def saved(path: Path, array: Any, *, mode: str | None = None, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that fromarray's mode is going
        image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("a.png", (RAMP * 65535).round().astype(np.uint16)),
        ("a.tif", (RAMP * 65535).round().astype(np.uint16)),
        ("big-endian.tif", (RAMP * 65535).round().astype(">u2")),
        ("whole.tif", (RAMP * 65535).round().astype(np.int32)),
        ("a.tif", RAMP.astype(np.float32)),
    ],
)
def test_pictures_of_more_than_8_bits_are_read_to_their_range(tmp_path: Path, name: str, array: Any) -> None:
    """Pillow's own conversion cuts them off: a depth map becomes white, and floats black."""
    path = saved(tmp_path / name, array)
    want = (RAMP * 255).round()
    assert np.abs(read_picture(path) - want[..., None]).max() <= 1
    assert read_picture(path).dtype == np.uint8
    assert np.abs(read_mask(path) - want).max() <= 1
    control = read_control(path)
    assert (control.dtype, control.shape) == (np.float32, (1, 3, 6, 8))
    assert np.abs(control - RAMP).max() < 1e-5  # not in steps of 1/255
    larger = read_control(path, size=(12, 16), resize=True)
    assert larger.shape == (1, 3, 12, 16)
    assert 0 <= larger.min() < 0.02
    assert 0.98 < larger.max() <= 1
    np.testing.assert_array_equal(read_picture(path, size=(12, 16), resize=True)[..., 0], (larger[0, 0] * 255).round())


def test_a_16_bit_picture_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    path = saved(tmp_path / "a.png", (RAMP * 65535).astype(np.uint16), exif=exif)
    assert np.abs(read_control(path)[0, 0] - np.rot90(RAMP, -1)).max() < 1e-4


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.full((2, 2), 70_000, np.int32), "from 70000 to 70000; allowed are whole numbers from 0 to 65535"),
        (np.array([[0, -1]], np.int32), "from -1 to 0"),
        (np.array([[0, 3.5]], np.float32), "from 0 to 3.5; allowed are floats from 0 to 1"),
        (np.array([[0, -0.1]], np.float32), "-0.1"),
        (np.array([[0, np.nan]], np.float32), "NaN or infinity"),
        (np.array([[0, np.inf]], np.float32), "NaN or infinity"),
    ],
)
def test_a_range_that_is_not_known_is_refused(tmp_path: Path, array: Any, says: str) -> None:
    path = saved(tmp_path / "a.tif", array)
    for reader in (read_picture, read_mask, read_control):
        with pytest.raises(BadInput, match=says):
            reader(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_kind_of_8_bit_colours_is_read(tmp_path: Path, mode: str) -> None:
    suffix = {"CMYK": "tif", "YCbCr": "jpg"}.get(mode, "png")
    colours = np.zeros((8, 8, 3), np.uint8)
    colours[:, 4:] = 255
    path = saved(tmp_path / f"a.{suffix}", colours, mode=mode)
    assert np.abs(read_picture(path).astype(int) - colours).max() <= 2
    assert read_control(path).dtype == np.uint8
    assert ((read_mask(path) >= 128) == (colours[..., 0] >= 128)).all()


def test_colours_that_are_not_known_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.new("LAB", (4, 4)).save(path)
    with pytest.raises(BadInput, match="LAB"):
        read_picture(path)


def test_of_several_pictures_the_first_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    frames = [Image.new("L", (4, 4), value) for value in (255, 0, 128)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert (read_picture(path) == 255).all()


# --- bounds


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file whose header says so, and whose pixels are all black as far as they go."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 1) * height if width * height < 1e8 else 1000))
    body = b"".join(chunk(*one) for one in ((b"IHDR", header), *chunks, (b"IDAT", rows), (b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + body


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def test_pixels_are_counted_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for content in (png(10_000, 10_000), png(2**31 - 1, 1), png(60_000, 60_000), bmp(30_000, 30_000), bmp(0, 5)):
        path.write_bytes(content)
        began = time.monotonic()
        for reader in (read_picture, read_mask, read_control):
            with pytest.raises(BadInput, match=r"pixels|too large|can't be read"):
                reader(path)
        assert time.monotonic() - began < 2


def test_pixels_are_counted_before_a_picture_is_resized(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(1, 60_000))
    for size in ((100_000, 100_000), (1, 10_000), (1, 2**40)):  # the second: 600 million half-way
        with pytest.raises(BadInput, match="allowed are 50,000,000"):
            read_picture(path, size=size, resize=True)


def test_bytes_are_counted_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(4, 4))
    monkeypatch.setattr(read, "MOST_BYTES", 20)
    with pytest.raises(BadInput, match="allowed are 20"):
        read_picture(path)


def test_what_is_no_file_of_a_picture_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "empty").touch()
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4\n")
    (tmp_path / "a.pgm").write_bytes(b"P5 2 2 255\n\0\0\0\0")
    (tmp_path / "cut.png").write_bytes(png(64, 64)[:-30])
    for name in ("pipe", "a.png", "empty", "a.eps", "a.pdf", "a.pgm", "cut.png", "none", ".", "/dev/zero", "/dev/null"):
        with pytest.raises(BadInput, match=name if name != "." else "folder"):
            read_picture(tmp_path / name)


def test_texts_that_unpack_to_much_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    bomb = b"a\0\0" + zlib.compress(bytes(1 << 26))
    path.write_bytes(png(4, 4, *[(b"zTXt", bomb)] * 3))
    with pytest.raises(BadInput, match="can't be read"):
        read_picture(path)


def seeds() -> list[bytes]:
    found = []
    rgb = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    for name, array in [
        *((name, rgb) for name in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")),
        ("PNG", (RAMP * 65535).astype(np.uint16)), ("TIFF", RAMP.astype(np.float32)),
    ]:  # fmt: skip
        file = io.BytesIO()
        Image.fromarray(array).save(file, name)
        found.append(file.getvalue())
    return found


@settings(max_examples=300, deadline=5000)
@given(
    st.sampled_from(seeds()),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8),
    st.integers(0, 2000),
    st.binary(max_size=20),
)
def test_a_damaged_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, changes: list[tuple[int, int]], length: int, more: bytes
) -> None:
    damaged = bytearray(content)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(bytes(damaged[:length] if length % 4 == 0 else damaged) + more)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(read, "MOST_PIXELS", 1_000_000)  # what is allowed takes its time
        for reader in (read_picture, read_mask, read_control):
            with suppress(BadInput):
                reader(path, size=(16, 16), resize=True)
