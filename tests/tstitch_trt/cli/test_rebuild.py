"""Engines compiled from a bundle's own ONNX: ``load(rebuild=True)`` and ``--rebuild``; and what stops them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tstitch_trt
from support.bundles import draw, edit, files, of_version
from support.command import Command, refused
from support.tiny import TinyPair
from tstitch_engines.backends import open_backend
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.compile.bundle import recompile
from tstitch_engines.errors import BadBundle, BadEngine, BuildFailed, Unavailable
from tstitch_engines.spec import Range
from tstitch_trt.verify.verify import verify


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture
def copy(tiny_pair: TinyPair, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pair.bundle, tmp_path / "copy.bundle"))


# --- what is mended


def test_only_what_does_not_fit_is_compiled_again(copy: Path, tiny_pair: TinyPair) -> None:
    edit(copy, of_version("0.0.1", "large"))
    with pytest.raises(BadEngine, match=r"member 'large'.*backend_version is 0.0.1") as caught:
        tstitch_trt.load(copy)
    assert f"tstitch-trt build {copy} --backend onnxruntime --device cpu; or add --rebuild" in caught.value.hint
    seen: list[str] = []
    latents = draw(copy, rebuild=True, progress=lambda phase, share: seen.append(phase))
    np.testing.assert_array_equal(latents, draw(tiny_pair.bundle))
    assert not any(phase.startswith("small") for phase in seen)
    assert seen[-1] == "done"
    # as if it had been built here in the first place, and so sound that nothing is left to do
    assert open_bundle(copy).manifest == open_bundle(tiny_pair.bundle).manifest
    assert {k: v for k, v in files(copy).items() if k != "manifest.json"} == {
        k: v for k, v in files(tiny_pair.bundle).items() if k != "manifest.json"
    }
    before = (copy / "manifest.json").stat().st_ino
    tstitch_trt.load(copy, rebuild=True).close()
    assert (copy / "manifest.json").stat().st_ino == before


@pytest.mark.parametrize(
    ("field", "value"), [("arch", "armv9-sve"), ("onnx_sha256", "0" * 64), ("precision", "fp16"), ("schema", 0)]
)
def test_every_mismatch_is_mended(copy: Path, tiny_pair: TinyPair, field: str, value: Any) -> None:
    edit(copy, lambda members: members["small"]["engines"][0]["identity"].update({field: value}))
    with pytest.raises(BadEngine, match=f"{field} is {value}"):
        tstitch_trt.load(copy)
    np.testing.assert_array_equal(draw(copy, rebuild=True), draw(tiny_pair.bundle))
    identity = open_bundle(copy).manifest.members["small"].engines[-1].identity
    assert identity == open_bundle(tiny_pair.bundle).manifest.members["small"].engines[0].identity
    draw(copy)


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_engine_file_is_mended(copy: Path, tiny_pair: TinyPair, damage: str) -> None:
    path = next((copy / "large").rglob("*.ort.onnx"))
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-100])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(BadBundle, match=damage) as caught:
        tstitch_trt.load(copy)
    assert "--rebuild" in caught.value.hint
    np.testing.assert_array_equal(draw(copy, rebuild=True), draw(tiny_pair.bundle))
    assert files(copy).keys() == files(tiny_pair.bundle).keys()
    open_bundle(copy)


def test_the_recorded_profile_and_options_are_kept(copy: Path) -> None:
    recompile(
        open_bundle(copy),
        backend="onnxruntime",
        names=["small"],
        profile={"B": Range(1, 2, 6)},
        options={"graph-optimisation": "basic"},
    )
    edit(copy, of_version("0.0.1", "small", "large"))
    tstitch_trt.load(copy, rebuild=True).close()
    identities = {name: m.engines[0].identity for name, m in open_bundle(copy).manifest.members.items()}
    assert identities["small"].profile.dims == {"B": Range(1, 2, 6)}
    assert identities["small"].options == {"graph-optimisation": "basic"}
    assert identities["large"].profile.dims == {"B": Range(1, 4, 8)}
    assert identities["large"].options == {}


def test_on_the_command_line(run: Command, copy: Path, tmp_path: Path) -> None:
    for command in (["sample", "--labels", "1", "-o", tmp_path / "a.png"], ["bench", "--repeats", 1, "--fractions", 0]):
        edit(copy, of_version("0.0.1", "small"))
        refused(run(*command, copy, "--steps", 2), "0.0.1", "--rebuild")
        outcome = run(*command, copy, "--steps", 2, "--rebuild")
        assert outcome.code == 0, outcome.err
        assert "compiling again: the onnxruntime engine of member 'small'" in outcome.err
        assert "member large" not in outcome.err
    edit(copy, of_version("0.0.1", "small"))
    said = run("verify", copy, "--rebuild", "--samples", 1, "--json").json
    assert [engine["status"] for engine in said["engines"]] == ["passed", "passed"]
    assert "backend_version" not in run("inspect", copy).err


def test_verify_leaves_what_can_t_run_here(copy: Path) -> None:
    """Rebuilding for a GPU that is not there is only an error when that backend was asked for."""

    def change(members: Any) -> None:
        record = members["small"]["engines"][0]
        record["identity"].update(backend="tensorrt", arch="sm_90", backend_version="10.0")
        path = record["files"][0]["path"]
        record["files"][0]["path"] = path.replace("onnxruntime", "tensorrt")
        (copy / path).rename(copy / record["files"][0]["path"])

    edit(copy, change)
    before = files(copy)
    result = verify(copy, samples=1, rebuild=True)
    assert [(check.backend, check.status) for check in result.engines] == [
        ("tensorrt", "not checked"),
        ("onnxruntime", "passed"),  # small's, which it had none of
        ("onnxruntime", "passed"),
    ]
    assert files(copy).keys() >= before.keys()
    with pytest.raises(Unavailable):
        verify(copy, backend="tensorrt", rebuild=True)


# --- what can't be


def test_altered_onnx_is_never_compiled(run: Command, copy: Path) -> None:
    """Not even where sizes alone are checked: what it computes is unknown."""
    opened = open_bundle(copy)
    path = opened.path(opened.manifest.members["small"].onnx[0])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    edit(copy, of_version("0.0.1", "small"))
    before = files(copy)
    for verify_how in ("full", "size"):
        with pytest.raises(BadBundle, match=rf"{path.name} is altered: its sha256 is") as caught:
            tstitch_trt.load(copy, rebuild=True, verify=verify_how)  # type: ignore[arg-type]
        assert f"tstitch-trt build {opened.manifest.recipe} --member small=" in caught.value.hint
    refused(run("build", copy), path.name, "altered", "--member small=")
    assert files(copy) == before


def test_exported_programs_are_not_in_a_bundle(run: Command, copy: Path) -> None:
    refused(run("build", copy, "--backend", "torch"), "'torch' is not compiled from ONNX", "--member small=")
    refused(run("sample", copy, "--backend", "torch", "--rebuild"), "not compiled from ONNX", "--backend torch")


def test_a_failing_compilation_leaves_everything(copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TSTITCH_TRT_CACHE", str(tmp_path / "cache"))
    edit(copy, of_version("0.0.1", "small", "large"))
    before = files(copy)
    kind = type(open_backend("onnxruntime"))
    real = kind.compile

    def second_fails(self: Any, *, member: Any, **rest: Any) -> Any:
        if member.config["depth"] == 2:
            raise BuildFailed("no memory", hint="buy some")
        return real(self, member=member, **rest)

    monkeypatch.setattr(kind, "compile", second_fails)
    with pytest.raises(BuildFailed, match="no memory"):
        tstitch_trt.load(copy, rebuild=True)
    assert files(copy) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    monkeypatch.undo()
    draw(copy, rebuild=True)


def test_ctrl_c_leaves_everything(copy: Path, tmp_path: Path) -> None:
    edit(copy, of_version("0.0.1", "small", "large"))
    before = files(copy)
    program = (
        "import sys, time, tstitch_trt\n"
        "def report(phase, share):\n"
        "    if phase.startswith('large'):\n"
        "        print('compiling', flush=True)\n"
        "        time.sleep(60)\n"
        "tstitch_trt.load(sys.argv[1], rebuild=True, progress=report)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(copy)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TSTITCH_TRT_CACHE": str(tmp_path / "cache")},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "compiling\n"
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in complaint
    assert files(copy) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "copy.bundle"]


def test_a_bundle_that_changed_meanwhile_is_not_overwritten(copy: Path) -> None:
    opened = open_bundle(copy)

    def meddle(phase: str, share: float) -> None:
        edit(copy, of_version("0.0.2", "large"))

    with pytest.raises(BuildFailed, match="changed by another process"):
        recompile(opened, backend="onnxruntime", profile={"B": Range(1, 3, 5)}, progress=meddle)
    assert '"0.0.2"' in (copy / "manifest.json").read_text()


DROP = """
import ctypes, os, sys
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
if os.geteuid() == 0 and ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0):
    sys.exit("no right to give up a right")
os.execv(sys.executable, [sys.executable, "-m", "tstitch_trt.cli", *sys.argv[1:]])
"""


@pytest.mark.parametrize("which", ["the bundle", "the folder it is in"])
def test_a_read_only_bundle_is_named_and_can_be_compiled_elsewhere(tmp_path: Path, copy: Path, which: str) -> None:
    """As root too, who gives up for it the right to write anywhere."""
    home = tmp_path / "home"
    home.mkdir()
    bundle = copy.rename(home / "a.bundle")
    edit(bundle, of_version("0.0.1", "small"))
    before = files(bundle)
    folder = bundle if which == "the bundle" else home
    folder.chmod(0o555)
    try:

        def command(*words: object) -> subprocess.CompletedProcess[str]:
            line = [sys.executable, "-c", DROP, *map(str, words)]
            return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)

        for words in (("sample", bundle, "--rebuild"), ("build", bundle)):
            done = command(*words)
            if "no right to give up" in done.stderr:
                pytest.skip("root here can't give up its right to write anywhere")
            assert done.returncode == 2
            assert f"{bundle} can't be replaced: {folder} is read-only" in done.stderr
            assert (
                f"hint: compile into another one: tstitch-trt build {bundle} --backend onnxruntime --device cpu -o DIR"
                in done.stderr
            )
        assert files(bundle) == before
        done = command("build", bundle, "-o", tmp_path / "other.bundle")
        assert done.returncode == 0, done.stderr
    finally:
        folder.chmod(0o755)
    draw(tmp_path / "other.bundle")
