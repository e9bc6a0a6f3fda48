"""Arrays from files that somebody else made: numbers, or an error before memory is taken for what is not there."""

from __future__ import annotations

import io
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.hostile import altered_bytes, only_our_errors
from support.manifests import manifest
from tstitch_engines.errors import BadInput
from tstitch_trt.cli._options import _embeddings
from tstitch_trt.files import atomic_file, load_array, open_arrays, read_lines, write_text


def npy(shape: Any, descr: Any = "<f4", body: bytes = b"") -> bytes:
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def archive(members: dict[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", packing) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return made.getvalue()


def read(path: Path) -> dict[str, Any]:
    with open_arrays(path) as stored:
        return {name: stored.read(name) for name in stored.names}


ARRAYS = {
    "rows": np.arange(6.0).reshape(2, 3),
    "columns": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    "scalar": np.float32(3),
    "empty": np.zeros((0, 4), np.uint8),
    "swapped": np.arange(3, dtype=">f2"),
    "flags": np.array([True, False]),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(save: Any, tmp_path: Path) -> None:
    save(tmp_path / "a.npz", **ARRAYS)
    for name, found in read(tmp_path / "a.npz").items():
        np.save(tmp_path / "a.npy", ARRAYS[name])
        for array in (found, load_array(tmp_path / "a.npy", option="--latents-in")):
            assert array.dtype == ARRAYS[name].dtype
            np.testing.assert_array_equal(array, ARRAYS[name])


BAD_ARRAYS = {
    "larger than the file": (npy((10**12,)), "4,000,000,000,000 bytes, and has 0"),
    "overflowing product": (npy((2**32, 2**32)), "has 0"),
    "nothing, very wide": (npy((0, 10**30)), "."),
    "negative": (npy((-1,), body=b"1234"), "numbers"),
    "smaller than the file": (npy((1,), body=b"12345678"), "4 bytes, and has 8"),
    "objects": (npy((1,), "|O", b"12345678"), "allowed are arrays of numbers"),
    "records": (npy((1,), [("a", "<f4")], b"1234"), "allowed are arrays of numbers"),
    "text": (npy((1,), "<U1", b"1234"), "allowed are arrays of numbers"),
    "no such number": (npy((1,), "<f3", b"123"), "it holds <f3"),
    "nested": (npy((1,)).replace(b"(1,)", b"(((("), "allowed are arrays of numbers"),
    "long header": (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"(" * 100, "allowed are 4,096"),
    "many sides": (npy((1,) * 33, body=b"1234"), "allowed are arrays of numbers"),
    "newer": (b"\x93NUMPY\x09\x00" + bytes(100), "version 1 and 2"),
    "nothing": (b"", "version 1 and 2"),
    "pickle": (b"cos\nsystem\n(S'touch owned'\ntR.", "version 1 and 2"),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_arrays_that_lie_are_refused(kind: str, tmp_path: Path) -> None:
    content, problem = BAD_ARRAYS[kind]
    (tmp_path / "a.npy").write_bytes(content)
    (tmp_path / "a.npz").write_bytes(archive({"a.npy": content}))
    with pytest.raises(BadInput, match=problem) as caught:
        load_array(tmp_path / "a.npy", option="--latents-in")
    assert caught.value.message.startswith("--latents-in")
    with pytest.raises(ValueError, match=problem):
        read(tmp_path / "a.npz")


BAD_ARCHIVES = {
    "bomb": (archive({f"{i}.npy": npy((16 << 20,), "|u1", bytes(16 << 20)) for i in range(5)}), "would unpack to 83,"),
    "many": (archive({f"{i}.npy": b"" for i in range(1001)}), "1,001 arrays"),
    "very many": (archive({f"{i}.npy": b"" for i in range(20_000)}), "directory is too large"),
    "other packing": (archive({"a.npy": npy((1,), body=b"1234")}, zipfile.ZIP_LZMA), "packed as numpy does not"),
    "one array": (npy((1,), body=b"1234"), r"no \.npz archive"),
    "cut short": (archive({"a.npy": npy((1,), body=b"1234")})[:-30], r"no \.npz archive"),
    "nothing": (b"", r"no \.npz archive"),
}


@pytest.mark.parametrize("kind", BAD_ARCHIVES)
def test_archives_that_lie_are_refused(kind: str, tmp_path: Path) -> None:
    content, problem = BAD_ARCHIVES[kind]
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        read(tmp_path / "a.npz")


def test_members_in_the_same_bytes_are_refused(tmp_path: Path) -> None:
    one = archive({"a.npy": npy((1 << 16,), "|u1", os.urandom(1 << 16))})
    start = one.index(b"PK\1\2")
    entry, end = one[start : one.rindex(b"PK\5\6")], bytearray(one[one.rindex(b"PK\5\6") :])
    entries = b"".join(entry.replace(b"a.npy", b"%c.npy" % (97 + i)) for i in range(9))
    end[8:16] = struct.pack("<HHI", 9, 9, len(entries))
    (tmp_path / "a.npz").write_bytes(one[:start] + entries + end)
    with pytest.raises(ValueError, match="says it would unpack to"):
        read(tmp_path / "a.npz")


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="a pipe, not a regular file"):
        load_array(tmp_path / "pipe", option="--latents-in")
    with pytest.raises(BadInput, match=re.escape("a pipe, not a regular file")):
        read_lines(tmp_path / "pipe", option="--prompts")
    with pytest.raises(ValueError, match="a pipe"):
        read(tmp_path / "pipe")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_altered_arrays(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    one, several = io.BytesIO(), io.BytesIO()
    np.save(one, np.arange(12.0).reshape(3, 4))
    np.savez_compressed(several, prompt_embeds=np.ones((2, 3, 4), np.float32), **{"small.text_embeds": np.ones((2, 4))})
    (folder / "a.npy").write_bytes(data.draw(altered_bytes(one.getvalue())))
    only_our_errors(lambda: load_array(folder / "a.npy", option="--latents-in"))
    (folder / "a.npz").write_bytes(data.draw(altered_bytes(several.getvalue())))
    only_our_errors(lambda: _embeddings(manifest(), folder / "a.npz"))


def test_a_file_gets_the_usual_mode_and_the_process_keeps_its_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To ask for the umask is to set it: two threads that do so can leave the process with none."""
    (tmp_path / "plain").touch()
    monkeypatch.setattr("os.umask", None)
    write_text(tmp_path / "written", "text")
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "written"):
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "written"]
    assert (tmp_path / "written").read_text() == "text"
