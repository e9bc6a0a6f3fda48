"""Bad input on the command line: the value, what is allowed, a hint, exit code 2, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.command import Command, refused
from support.tiny import TinyPair
from tstitch_trt.cli._errors import as_failure

PAIR = "PAIR"  # stands for the bundle in the cases


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(capfd)


@pytest.fixture(scope="session")
def bundle(tiny_pair: TinyPair) -> Path:
    return tiny_pair.bundle


CASES = {
    "no such command": ("smaple x", "'smaple'", "known: demo, build, sample", "did you mean 'sample'?"),
    "help as a command": ("help sample", "'help'", "tstitch-trt --help"),
    "no such option": ("sample PAIR --fracton 0.4", "'--fracton'", "did you mean '--fraction'?", "sample --help"),
    "no number": ("sample PAIR --fraction 40%", "'40%' is not a number", "0 to 1"),
    "bundle left out": ("sample", "needs BUNDLE", "tstitch-trt sample [OPTIONS] BUNDLE"),
    "too many arguments": ("inspect PAIR extra", "extra", "tstitch-trt inspect --help"),
    "steps are no number": ("sample PAIR --steps many", "--steps", "'many'", "whole number"),
    "no steps": ("sample PAIR --steps 0", "--steps", "0", "x>=1"),
    "no such bundle": ("sample nothing.bundle", "nothing.bundle", "tstitch-trt build"),
    "unknown solver": ("sample PAIR --solver dimm", "'dimm'", "ddim, ", "did you mean 'ddim'?"),
    "unknown spacing": ("sample PAIR --spacing liner", "'liner'", "linspace"),
    "unknown member": ("sample PAIR --schedule smal:0.4,large", "'smal'", "small, large", "did you mean 'small'?"),
    "unknown rounding": ("sample PAIR --fraction 0.5 --rounding up", "'up'", "paper, floor"),
    "unknown device": ("sample PAIR --device gpu", "'gpu'", "cpu, cuda", "cuda is the first NVIDIA GPU"),
    "unknown backend": ("sample PAIR --backend onnx", "'onnx'", "onnxruntime"),
    "fraction above 1": ("sample PAIR --fraction 1.5", "1.5", "0..1", "--fraction 0.4"),
    "threads without end": ("sample PAIR --threads 100000", "100000", "from 0 to", "--threads 1"),
    "images without end": ("sample PAIR -n 100000000", "100000000", "100000", "-n 1"),
    "labels without end": ("sample PAIR --labels 0-9,0-99999", "100,000"),
    "guidance beyond float32": ("sample PAIR --guidance 1e39", "1e+39", "float32"),
    "digits without end": ("bench PAIR --fractions 1e999999999", "1e999999999", "--fractions"),
    "fraction is nan": ("sample PAIR --fraction nan", "nan", "0..1"),
    "fraction and schedule": ("sample PAIR --fraction 0.5 --schedule small,large", "fraction 0.5", "one of the two"),
    "counts that do not add up": ("sample PAIR --steps 10 --schedule small:3,large:4", "7", "10 steps", "--steps 7"),
    "label out of range": ("sample PAIR --labels 10", "label 10", "0 to 9", "--labels 0-9"),
    "label of no class": ("sample PAIR --labels cat", "'cat'", "0 to 9", "--labels"),
    "n without labels": ("sample PAIR -n 5", "-n 5", "--labels 0-9"),
    "fewer images than labels": ("sample PAIR --labels 0-9 -n 5", "labels", "10", "5 images", "at most 5"),
    "seeds of another number": ("sample PAIR --labels 0 -n 3 --seeds 1,2", "n: 3", "seeds: 2"),
    "seed below zero": ("sample PAIR --labels 0 --seed -1", "--seed", "-1", "x>=0"),
    "seeds are no numbers": ("sample PAIR --seeds a", "'a'", "--seeds 1,2,5-9"),
    "guidance below zero": ("sample PAIR --guidance -1", "-1", "from 0 on", "--guidance 1.5"),
    "guided channels": ("sample PAIR --guidance 2 --guided-channels 9", "9", "1..4", "4 channels"),
    "guidance interval": ("sample PAIR --guidance-interval 5:2", "'5:2'", "FIRST < STOP", "--guidance-interval 10:40"),
    "interval beyond the steps": ("sample PAIR --guidance-interval 5:99 --guidance 2", "5:99", "10 steps"),
    "images as jpg": ("sample PAIR -o a.jpg", "'a.jpg'", ".npz", "-o a.png"),
    "folder of the output": ("sample PAIR -o no/a.png", "'no/a.png'", "does not exist", "mkdir -p no"),
    "latents out of another kind": ("sample PAIR --latents-out a.npz", "'a.npz'", "FILE.npy"),
    "latents in missing": ("sample PAIR --latents-in no.npy", "'no.npy'", "numpy.save"),
    "latents in of another shape": ("sample PAIR --latents-in shape.npy", "[2, 4, 4, 4]", "float32[N, 4, 8, 8]"),
    "latents in are no array": ("sample PAIR --latents-in text.npy", "text.npy", "numpy.save"),
    "bench fractions": ("bench PAIR --fractions 0:2:0.5", "2", "outside 0 to 1", "--fractions 0:1:0.1"),
    "bench batch outside the profile": ("bench PAIR --batch 99", "99", "1 to 8", "build again with --batch"),
    "bench guided batch": ("bench PAIR --batch 8 --guidance 2", "8", "1 to 4", "--batch 4"),
    "bench against": ("bench PAIR --against jax", "'jax'", "torch", "use one of: torch"),
    "bench plot": ("bench PAIR --plot a.svg", "'a.svg'", ".png", "--plot a.png"),
    "no recipe": ("build", "nothing", "fashion", "tstitch-trt build --list"),
    "unknown recipe": ("build fashon", "'fashon'", "known: dit, dit-256", "did you mean 'fashion'?"),
    "member without checkpoint": ("build dit-256 --member small", "'small'", "NAME=CHECKPOINT", "--member small="),
    "member missing": ("build dit-256", "'small'", "--member small=CHECKPOINT"),
    "member twice": ("build dit-256 --member small=a --member small=b", "'small' twice", "once"),
    "checkpoint is no file": ("build dit-256 --member small=no.pt --member large=no.pt", "no.pt", "does not exist"),
    "checkpoint is no DiT": ("build dit-256 --member small=vae.safetensors --member large=x.pt", "no DiT", "a VAE"),
    "checkpoint carries code": ("build dit-256 --member small=evil.pt --member large=x.pt", "evil.pt", "run code"),
    "unknown precision": ("build fashion --precision fp8", "'fp8'", "fp32, fp16, bf16"),
    "precision twice": ("build fashion --precision fp32 --precision small=fp16", "fp32 and small=fp16", "one"),
    "batch order": ("build fashion --batch 4:2", "4:2", "MIN <= OPT <= MAX", "--batch 1:8:16"),
    "batch is no profile": ("build fashion --batch big", "'big'", "MIN:OPT:MAX"),
    "unknown build backend": ("build fashion --backend tensorflow", "'tensorflow'", "onnxruntime"),
    "unknown build option": ("build dit-256 --option level=1 --member small=a --member large=b", "'level'"),
    "demo as jpg": ("demo -o a.jpg", "'a.jpg'", "-o a.png"),
}


@pytest.fixture
def traps(tmp_path: Path) -> None:
    """The files that some cases name."""
    import pickle

    from safetensors.numpy import save_file

    np.save(tmp_path / "shape.npy", np.zeros((2, 4, 4, 4), np.float32))
    (tmp_path / "text.npy").write_text("no array")
    save_file({"decoder.conv_in.weight": np.zeros((4, 4, 3, 3), np.float32)}, tmp_path / "vae.safetensors")

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, ("touch pwned",)

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"x": Evil()}, protocol=2))


@pytest.mark.usefixtures("traps")
@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_with_a_hint(run: Command, bundle: Path, tmp_path: Path, case: str) -> None:
    line, *parts = CASES[case]
    before = sorted(p.name for p in tmp_path.iterdir())
    refused(run(*(bundle if word == PAIR else word for word in line.split())), *parts)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_no_arguments_show_the_help_and_exit_2(run: Command) -> None:
    outcome = run()
    assert outcome.code == 2
    assert "Commands:" in outcome.err


@pytest.fixture
def damaged(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy.bundle"))


def edit(bundle: Path, old: str, new: str) -> None:
    path = bundle / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("suffix", [".onnx", ".ort.onnx"])
@pytest.mark.parametrize("command", ["sample", "bench", "inspect"])
def test_a_truncated_file_is_named(run: Command, damaged: Path, suffix: str, command: str) -> None:
    path = next(p for p in damaged.rglob("*.onnx") if p.name.endswith(".ort.onnx") == (suffix == ".ort.onnx"))
    path.write_bytes(path.read_bytes()[:-100])
    refused(run(command, damaged), path.name, "truncated", "tstitch-trt build")


def test_an_altered_file_fails_its_hash(run: Command, damaged: Path) -> None:
    path = next(damaged.rglob("*.ort.onnx"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(run("sample", damaged, "--labels", "0"), path.name, "sha256", "tstitch-trt build")


def test_a_manifest_may_not_point_outside(run: Command, damaged: Path) -> None:
    name = json.loads((damaged / "manifest.json").read_text())["members"]["small"]["onnx"][0]["path"]
    edit(damaged, name, "../../etc/passwd")
    refused(run("sample", damaged, "--labels", "0"), "../../etc/passwd", "inside the bundle")


def test_an_unknown_manifest_field_names_the_nearest(run: Command, damaged: Path) -> None:
    edit(damaged, '"latent"', '"laten"')
    refused(run("inspect", damaged), "laten", "did you mean 'latent'?")


def test_an_engine_of_another_version_says_what_differs(run: Command, damaged: Path) -> None:
    path = damaged / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["members"]["large"]["engines"][0]["identity"]["backend_version"] = "0.0.1"
    path.write_text(json.dumps(manifest))
    refused(run("sample", damaged, "--labels", "0"), "'large'", "backend_version", "0.0.1", "tstitch-trt build")


def test_an_unknown_recipe_key_names_the_nearest(run: Command, tiny_pair: TinyPair, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(tiny_pair.recipe("small").read_text().replace("[noise]", "[nois]"))
    refused(run("build", recipe), "nois", "did you mean 'noise'?")


def test_nan_in_the_latents_is_named_with_step_and_member_and_is_failed_work(
    run: Command, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    broken = tiny_pair.broken_large()
    outcome = run(
        "sample", broken, "--labels", "1", "--steps", 6, "--guidance", 1, "--fraction", 0.5, "-o", tmp_path / "a.png"
    )
    assert outcome.code == 1
    assert "step 4 of 6" in outcome.err
    assert "'large'" in outcome.err
    assert "hint: " in outcome.err
    assert not (tmp_path / "a.png").exists()


def test_a_failed_build_leaves_the_old_bundle(run: Command, damaged: Path, tiny_pair: TinyPair, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in damaged.rglob("*") if p.is_file()}
    recipe = tiny_pair.recipe("small", "large")
    bad = f"large={tmp_path / 'missing.pt'}"
    refused(run("build", recipe, "--member", f"small={tiny_pair.checkpoint('small')}", "--member", bad, "-o", damaged))
    assert {p: p.read_bytes() for p in damaged.rglob("*") if p.is_file()} == before


def test_traceback_is_for_those_who_ask(run: Command, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" not in run("sample", bundle, "--labels", "99").err
    assert "Traceback" in run("sample", bundle, "--labels", "99", "--traceback").err
    monkeypatch.setenv("TSTITCH_TRT_TRACEBACK", "1")
    refused(run("sample", bundle, "--labels", "99"))
    assert "Traceback" in run("sample", bundle, "--labels", "99").err


@pytest.mark.parametrize(
    ("number", "code", "hint"),
    [(errno.ENOSPC, 1, "free some space"), (errno.EACCES, 2, "read and write"), (errno.ENOENT, 2, "mkdir -p")],
)
def test_what_the_file_system_refuses_has_a_hint_too(number: int, code: int, hint: str) -> None:
    failure = as_failure(OSError(number, os.strerror(number), "out.png"))
    assert failure.exit_code == code
    assert "out.png" in failure.message
    assert hint in failure.hint


def test_a_reader_that_goes_away_gets_no_message() -> None:
    line = f"{sys.executable} -m tstitch_trt.cli build --list | true"
    assert subprocess.run(["bash", "-c", line], capture_output=True, text=True).stderr == ""
