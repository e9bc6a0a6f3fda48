"""Bundles on disk: what is refused when one is opened, and that replacing one is all or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import get_ident
from typing import Any, Literal

import msgspec
import pytest

from support.manifests import manifest, member
from tstitch_engines.bundle import bundle as module
from tstitch_engines.bundle.bundle import Bundle, open_bundle, rebuild_command, write_bundle
from tstitch_engines.bundle.files import copy_component, replace_file
from tstitch_engines.bundle.manifest import SCHEMA, Component, Manifest, Origin, Source
from tstitch_engines.errors import BadBundle, BuildFailed


def make(output: Path, weights: bytes = b"weights" * 100, name: str = "test") -> Bundle:
    def fill(staging: Path) -> Manifest:
        source = output.parent / "source.bin"
        source.write_bytes(weights)
        part = copy_component(source, staging, "small/model.onnx")
        return manifest({"small": msgspec.structs.replace(member(), files={"graph": part})}, name=name)

    return write_bundle(output, fill)


def edit(output: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = output / "manifest.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_round_trip(tmp_path: Path) -> None:
    written = make(tmp_path / "a.bundle")
    opened = open_bundle(str(tmp_path / "a.bundle"))
    assert opened.manifest == written.manifest
    (part,) = opened.manifest.components()
    assert opened.path(part).read_bytes() == b"weights" * 100
    assert names(tmp_path) == ["a.bundle", "source.bin"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: shutil.rmtree(b), "does not exist"),
        (lambda b: (b / "manifest.json").unlink(), "no manifest.json, only small"),
        (lambda b: (b / "manifest.json").write_bytes((b / "manifest.json").read_bytes()[:200]), "is damaged"),
        (lambda b: (b / "manifest.json").write_text('{"version": 3}'), "states no schema version"),
        (lambda b: edit(b, lambda d: d.update(schema=SCHEMA + 1)), f"schema version {SCHEMA + 1}; this version reads"),
        (lambda b: edit(b, lambda d: d["members"]["small"].update(onxx=[])), "unknown field 'members.small.onxx'"),
        (lambda b: edit(b, lambda d: d["members"]["small"].pop("family")), "missing required field `family`"),
        (lambda b: edit(b, lambda d: d["latent"].update(height="tall")), "'latent.height'"),
        (lambda b: edit(b, lambda d: d["members"]["small"]["inputs"][0].update(dtype="float33")), "float33"),
        (lambda b: (b / "small/model.onnx").unlink(), "model.onnx is missing"),
        (lambda b: (b / "small/model.onnx").write_bytes(b"weights"), "has 7 bytes, the manifest says 700: truncated"),
        (lambda b: (b / "small/model.onnx").write_bytes(b"weighty" * 100), "is altered: its sha256 is"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    make(tmp_path / "a.bundle")
    damage(tmp_path / "a.bundle")
    with pytest.raises(BadBundle) as caught:
        open_bundle(tmp_path / "a.bundle")
    assert words in caught.value.message
    assert "tstitch-trt build" in caught.value.hint


def test_unknown_field_names_the_nearest(tmp_path: Path) -> None:
    make(tmp_path / "a.bundle")
    edit(tmp_path / "a.bundle", lambda d: d["members"]["small"].update(parametrization="eps"))
    with pytest.raises(BadBundle, match="did you mean 'parametrisation'"):
        open_bundle(tmp_path / "a.bundle")


def test_size_check_reads_no_content(tmp_path: Path) -> None:
    make(tmp_path / "a.bundle")
    (tmp_path / "a.bundle/small/model.onnx").write_bytes(b"weighty" * 100)
    open_bundle(tmp_path / "a.bundle", verify="size")
    (tmp_path / "a.bundle/small/model.onnx").write_bytes(b"weighty")
    with pytest.raises(BadBundle, match="truncated"):
        open_bundle(tmp_path / "a.bundle", verify="size")


@pytest.mark.parametrize("path", ["../secret", "small/../../secret", "/etc/hostname", "", "..\\secret"])
def test_paths_outside_are_refused(tmp_path: Path, path: str) -> None:
    made = make(tmp_path / "a.bundle")
    (tmp_path / "secret").write_bytes(b"weights" * 100)
    edit(tmp_path / "a.bundle", lambda d: d["members"]["small"]["files"]["graph"].update(path=path))
    with pytest.raises(BadBundle, match="do not trust this bundle"):
        open_bundle(tmp_path / "a.bundle")
    with pytest.raises(BadBundle):
        made.path(Component(path=path, sha256="", bytes=0))


def test_links_out_of_the_bundle_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "a.bundle")
    inside = tmp_path / "a.bundle/small"
    inside.rename(tmp_path / "elsewhere")
    inside.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadBundle, match="through a symbolic link"):
        open_bundle(tmp_path / "a.bundle")


@pytest.mark.parametrize("swap", [True, False])
def test_replacing_is_all_or_nothing(tmp_path: Path, swap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not swap:  # a file system without an atomic exchange
        monkeypatch.setattr(module, "exchange", lambda a, b: False)
    output = tmp_path / "a.bundle"
    make(output, name="old")
    before = contents(output)

    def fails(staging: Path) -> Manifest:
        (staging / "half").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_bundle(output, fails)
    assert contents(output) == before
    assert names(tmp_path) == ["a.bundle", "source.bin"]

    make(output, b"new", name="new")
    assert open_bundle(output).manifest.name == "new"
    assert names(tmp_path) == ["a.bundle", "source.bin"]


def test_old_bundle_comes_back_when_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "a.bundle"
    make(output, name="old")
    monkeypatch.setattr(module, "exchange", lambda a, b: False)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if ".building-" in self.name and target == output:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(BuildFailed, match="No space left"):
        make(output, b"new", name="new")
    assert open_bundle(output).manifest.name == "old"


def test_a_crash_between_two_renames_is_mended(tmp_path: Path) -> None:
    output = tmp_path / "a.bundle"
    make(output, name="old")
    output.rename(tmp_path / ".a.bundle.replaced")

    def fails(staging: Path) -> Manifest:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_bundle(output, fails)
    assert open_bundle(output).manifest.name == "old"


def test_foreign_directories_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/thesis.txt").write_text("years of work")
    with pytest.raises(BadBundle, match="replaces bundles only"):
        make(tmp_path / "docs")
    assert (tmp_path / "docs/thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadBundle, match="is a file"):
        make(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")


def test_rebuild_command_names_given_checkpoints_only() -> None:
    given = msgspec.structs.replace(member(), sources=(Source(name="S 1.pt", sha256="", bytes=1),))
    folder = msgspec.structs.replace(member(), sources=(Source(name="XL/config.json", sha256="", bytes=1),))
    shipped = msgspec.structs.replace(member(), sources=(Source(name="s", sha256="", bytes=1, shipped=True),))
    words = rebuild_command(manifest({"a": given, "b": folder, "c": shipped}, recipe="dit-256"), Path("x.bundle"))
    assert words == "tstitch-trt build dit-256 --member 'a=S 1.pt' --member b=XL -o x.bundle"


def test_rebuild_command_names_the_commits_of_hugging_face() -> None:
    def of(given: str, file: str) -> Any:
        origin = Origin(repository="org/sd", revision="main", commit="a1" * 20, path=file, given=given)
        return msgspec.structs.replace(member(), sources=(Source(name="x", sha256="", bytes=1, origin=origin),))

    found = manifest({"a": of("", "unet/config.json"), "b": of("unet", "unet/config.json")}, recipe="mine")
    parts = {"vae_decoder": of("", "vae/config.json"), "vae_encoder": of("vae", "vae/config.json")}
    words = rebuild_command(msgspec.structs.replace(found, parts=parts), Path("x.bundle"))
    commit = "a1" * 20
    assert words == (
        f"tstitch-trt build mine --member a=org/sd@{commit} --member b=org/sd/unet@{commit} "
        f"--part vae_encoder=org/sd/vae@{commit} -o x.bundle"
    )


def test_rebuild_command_names_parts_that_were_given_and_precisions() -> None:
    def of(name: str, precision: Literal["fp32", "fp16"] = "fp32") -> Any:
        return msgspec.structs.replace(member(), precision=precision, sources=(Source(name=name, sha256="", bytes=1),))

    found = manifest({"a": of("SD/config.json", "fp16")}, recipe="mine")
    parts = {"vae_decoder": of("SD/vae/config.json"), "controlnet": of("canny/config.json", "fp16")}
    words = rebuild_command(msgspec.structs.replace(found, parts=parts), Path("x.bundle"))
    assert words == (
        "tstitch-trt build mine --member a=SD --part controlnet=canny --precision a=fp16 --precision controlnet=fp16 "
        "-o x.bundle"
    )


def test_links_and_pipes_among_the_studies_are_left_behind(tmp_path: Path) -> None:
    bundle, secret = tmp_path / "a.bundle", tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("secret")
    make(bundle)
    studies = bundle / "studies"
    studies.mkdir()
    (studies / "search.json").write_text("{}")
    (studies / "link.json").symlink_to(secret / "key")
    (studies / "folder").symlink_to(secret)
    os.mkfifo(studies / "pipe.json")
    make(bundle)
    assert names(studies) == ["search.json"]
    shutil.rmtree(studies)
    studies.symlink_to(secret)
    make(bundle)
    assert not studies.exists()


def test_a_scratch_file_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / f".a.{os.getpid()}-{get_ident()}").symlink_to(tmp_path / "secret")
    replace_file(tmp_path / "a", b"new")
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "secret").read_text()) == (b"new", "secret")
    assert names(tmp_path) == ["a", "secret"]


def test_threads_that_replace_a_file_at_once(tmp_path: Path) -> None:
    contents = [bytes([number]) * (1 << 20) for number in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(replace_file, tmp_path / "a", content) for content in contents * 20]:
            done.result()
            assert (tmp_path / "a").read_bytes() in contents
    assert names(tmp_path) == ["a"]
