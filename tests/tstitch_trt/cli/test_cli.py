"""The commands over real bundles: what they write, print and return."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

import tstitch_trt
from support.command import Command, refused
from support.pictures import read_metadata
from support.tiny import TinyPair
from tstitch_trt.cli import COMMANDS, cli
from tstitch_trt.plan.options import DEFAULTS
from tstitch_trt.request.options import SampleKeywords


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture(scope="session")
def bundle(tiny_pair: TinyPair) -> Path:
    return tiny_pair.bundle


def subcommand(name: str) -> click.Command:
    assert isinstance(cli, click.Group)
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


# --- help


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_ends_in_examples_that_parse(run: Command, name: str | None) -> None:
    outcome = run(*([name] if name else []), "--help")
    assert outcome.code == 0
    assert outcome.err == ""
    _, _, examples = outcome.out.partition("Examples:\n")
    lines = [line.strip() for line in examples.strip().splitlines()]
    assert lines
    for line in lines:
        program, command, *args = shlex.split(line)
        assert program == "tstitch-trt"
        assert name in (None, command)
        with subcommand(command).make_context(command, args):  # unknown options and missing arguments raise
            pass


def test_every_option_is_explained() -> None:
    for name in COMMANDS:
        for parameter in subcommand(name).params:
            assert isinstance(parameter, click.Argument) or getattr(parameter, "help", None), parameter.name


@pytest.mark.parametrize("name", ["sample", "bench", "profile", "report", "quantise"])
def test_what_was_not_said_is_handed_on_as_not_said(name: str) -> None:
    """A default of the command line would look like a wish of the user."""
    own = {"seed"} if name != "sample" else set()  # a seed of a study, which always has one
    required = shlex.split("--member large --mode int8 -o b.bundle") if name == "quantise" else []
    with subcommand(name).make_context(name, ["a.bundle", *required]) as context:
        said = {key: value for key, value in context.params.items() if value not in (None, ())}
    assert not said.keys() & (SampleKeywords.__annotations__.keys() - own)


def test_help_of_sample_shows_the_defaults_that_are_taken() -> None:
    params = {parameter.name: parameter for parameter in subcommand("sample").params}
    for name in ("history", "rounding", "guidance_rescale"):
        option = params[name]
        assert isinstance(option, click.Option)
        default = DEFAULTS[name]
        assert f"[{default if isinstance(default, str) else f'{default:g}'}]" in (option.help or "")


def test_help_and_version_import_nothing_heavy() -> None:
    script = (
        "import sys; from tstitch_trt.cli import main\n"
        "for args in (['--help'], ['--version'], *([c, '--help'] for c in sys.argv[1:])): assert main(args) == 0\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'PIL', 'matplotlib', 'rich', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script, *COMMANDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version(run: Command) -> None:
    outcome = run("--version")
    assert outcome.code == 0
    assert outcome.out == f"tstitch-trt {tstitch_trt.__version__}\n"


# --- sample


def test_sample_writes_a_grid_and_says_in_it_how_it_was_made(run: Command, bundle: Path, tmp_path: Path) -> None:
    grid = tmp_path / "grid.png"
    outcome = run("sample", bundle, "--labels", "3,5,0-1", "-n", 6, "--steps", 4, "--fraction", 0.5, "-o", grid)
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{grid}\n"
    assert "small 2 steps" in outcome.err
    said = json.loads(read_metadata(grid)["tstitch-trt"])
    assert said["schedule"]["members"] == ["small", "small", "large", "large"]
    assert [image["label"] for image in said["images"]] == [3, 5, 0, 1, 3, 5]
    assert [image["seed"] for image in said["images"]] == [0, 1, 2, 3, 4, 5]
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_sample_json_is_one_document_with_what_was_resolved(run: Command, bundle: Path, tmp_path: Path) -> None:
    npz = tmp_path / "a.npz"
    latents = tmp_path / "a.npy"
    args = ("sample", bundle, "--labels", "0-9", "--steps", 4, "--schedule", "large:1,small", "--seed", 7)
    outcome = run(*args, "--json", "-o", npz, "--latents-out", latents)
    said = outcome.json
    assert said["schedule"]["text"] == "large:1,small"
    assert said["schedule"]["segments"] == [
        {"member": "large", "start": 0, "stop": 1},
        {"member": "small", "start": 1, "stop": 4},
    ]
    assert [t["member"] for t in said["timings"]] == ["large", "small"]
    assert said["total_ms"] == pytest.approx(sum(t["ms"] for t in said["timings"]))
    assert said["files"] == [str(npz)]

    with tstitch_trt.load(bundle) as runtime:
        want = runtime.sample(labels=list(range(10)), steps=4, schedule="large:1,small", seed=7)
    with np.load(npz) as stored:
        assert stored["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(stored["arr_0"], want.images)
    np.testing.assert_array_equal(np.load(latents), want.latents)


def test_sample_into_a_folder_writes_one_png_per_image(run: Command, bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert run("sample", bundle, "--labels", "4", "-n", 3, "--seeds", "9,1,2", "--steps", 2, "-o", folder).code == 0
    assert sorted(p.name for p in folder.iterdir()) == ["00000.png", "00001.png", "00002.png"]
    assert json.loads(read_metadata(folder / "00000.png")["tstitch-trt"])["seed"] == 9
    with Image.open(folder / "00001.png") as image, tstitch_trt.load(bundle) as runtime:
        want = runtime.sample(labels=4, seed=1, steps=2).images
        assert want is not None
        np.testing.assert_array_equal(np.asarray(image), want[0])


def test_latents_in_take_the_place_of_the_seeds(run: Command, bundle: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    np.save(tmp_path / "in.npy", noise)
    args = ("sample", bundle, "--labels", "3", "--steps", 3, "--latents-in", tmp_path / "in.npy")
    outcome = run(*args, "--latents-out", tmp_path / "out.npy")
    assert outcome.code == 0, outcome.err
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["in.npy", "out.npy"]  # no images were asked for
    with tstitch_trt.load(bundle) as runtime:
        want = runtime.sample(labels=[3, 3], steps=3, latents=noise).latents
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), want)


def test_without_labels_one_of_each_class(
    run: Command, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = run("sample", bundle, "--steps", 1, "--json").json
    assert [image["label"] for image in said["images"]] == list(range(10))
    assert (tmp_path / "samples.png").is_file()


def test_every_option_of_the_trajectory_reaches_the_runtime(run: Command, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "l.npy"
    args = (
        "--steps 6 --solver dpmpp-2m-sde --sigmas karras --history reset --guidance 3 --guidance-rescale 0.5 "
        "--guidance-interval 1:5 --guided-channels 3 --fraction 0.5 --rounding timestep --seed 5"
    )
    assert run("sample", bundle, "--labels", "1", *args.split(), "--latents-out", out, "--threads", 1).code == 0
    with tstitch_trt.load(bundle, threads=1) as runtime:
        want = runtime.sample(
            labels=1,
            steps=6,
            solver="dpmpp-2m-sde",
            sigmas="karras",
            history="reset",
            guidance=3,
            guidance_rescale=0.5,
            guidance_interval=(1, 5),
            guided_channels=3,
            fraction=0.5,
            rounding="timestep",
            seed=5,
        )
    np.testing.assert_array_equal(np.load(out), want.latents)


def interrupt(*args: object, delay: float = 0) -> subprocess.CompletedProcess[str]:
    """Runs a command and sends Ctrl-C ``delay`` seconds after ONNX Runtime came into its memory.

    Without delay that is in the middle of an import, in which a ``KeyboardInterrupt`` becomes another error.
    """
    words = [sys.executable, "-m", "tstitch_trt.cli", *map(str, args)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            maps = Path(f"/proc/{process.pid}/maps")
            while process.poll() is None and "onnxruntime_pybind" not in maps.read_text():
                time.sleep(0.05)
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.mark.parametrize("delay", [0, 2])
def test_ctrl_c_while_sampling_exits_130_and_leaves_no_half_file(bundle: Path, tmp_path: Path, delay: float) -> None:
    args = ("sample", bundle, "--labels", "0", "-n", 4000, "--steps", 1000, "-o", tmp_path / "a.png")
    done = interrupt(*args, delay=delay)
    assert done.returncode == 130, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_an_exec_of_text_exits_130(tmp_path: Path) -> None:
    """As in an import that makes a namedtuple: `python -m` would end by the signal."""
    (tmp_path / "pressed.py").write_text(
        "import os, signal, sys, click\n"
        "from tstitch_trt import cli\n"
        "@click.command\n"
        "def wait(): exec('os.kill(os.getpid(), signal.SIGINT)\\nwhile True: pass')\n"
        "cli.cli = wait\n"
        "sys.exit(cli.main([]))\n"
    )
    done = subprocess.run([sys.executable, "-m", "pressed"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted")


def test_ctrl_c_while_building_leaves_the_old_bundle(bundle: Path, tiny_pair: TinyPair, tmp_path: Path) -> None:
    old = Path(shutil.copytree(bundle, tmp_path / "old.bundle"))
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    members = [f"--member={name}={tiny_pair.checkpoint(name)}" for name in ("small", "large")]
    done = interrupt(
        "build", tiny_pair.recipe("small", "large"), *members, "--option", "graph-optimisation=basic", "-o", old
    )
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["old.bundle"]
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before


# --- inspect, doctor, build


def test_inspect_shows_members_engines_and_hashes(run: Command, bundle: Path) -> None:
    said = run("inspect", bundle, "--json").json
    assert list(said["members"]) == ["small", "large"]
    engine = said["members"]["large"]["engines"][0]
    assert len(engine["digest"]) == 64
    text = run("inspect", bundle).out
    for part in ("member small", "sample float32[B, 4, 8, 8]", "safetensors", engine["digest"][:16]):
        assert part in text
    for component in said["members"]["small"]["onnx"]:
        assert component["sha256"] in text


def test_doctor_says_what_runs_here_and_how_to_mend_the_rest(run: Command) -> None:
    said = run("doctor", "--json").json
    checks = {(check["group"], check["name"]): check for check in said["checks"]}
    assert checks["backend", "onnxruntime on cpu"]["ok"]
    assert checks["native", "step kernels"]["ok"]
    assert said["usable"]
    assert all(check["hint"] for check in said["checks"] if not check["ok"])
    text = run("doctor")
    assert text.code == 0
    assert "hint: " in text.out


def test_build_makes_a_bundle_and_reuses_it(run: Command, tiny_pair: TinyPair, tmp_path: Path) -> None:
    output = tmp_path / "b.bundle"
    args = [
        "build",
        tiny_pair.recipe("small", "large"),
        "--member",
        f"small={tiny_pair.checkpoint('small')}",
        "--member",
        f"large={tiny_pair.checkpoint('large')}",
        "--batch",
        "1:2:4",
        "-o",
        output,
    ]
    first = run(*args)
    assert first.code == 0, first.err
    assert first.out == f"{output}\n"
    again = run(*args, "--json")
    assert again.json["members"]["small"]["engines"][0]["identity"]["profile"] == {
        "dims": {"B": {"min": 1, "opt": 2, "max": 4}}
    }
    assert "reused from the bundle" in again.err
    assert run("sample", output, "--labels", "1", "--steps", 1, "-o", tmp_path / "a.png").code == 0


def test_build_list_names_the_recipes(run: Command) -> None:
    assert {recipe["name"] for recipe in run("build", "--list", "--json").json} >= {"fashion", "dit-256", "dit-512"}
    assert "fashion" in run("build", "--list").out


def test_demo_needs_no_torch_and_shows_time_and_quality(fashion_bundle: Path, tmp_path: Path) -> None:
    """In a process that can't import torch or onnx, as after README's first command."""
    script = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'onnx', 'onnxscript', 'diffusers', 'safetensors', 'matplotlib'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from tstitch_trt.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    args = ["demo", "--samples", "10", "--steps", "4", "--bundle", str(fashion_bundle), "-o", str(tmp_path / "d.png")]
    done = subprocess.run([sys.executable, "-c", script, *args, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [point["fraction"] for point in said["points"]] == [0, 0.25, 0.5, 0.75, 1]
    assert [point["members"] for point in said["points"]][2] == {"small": 2, "large": 2}
    for point in said["points"]:
        assert point["ms_per_image"] > 0
        assert 0 <= point["accuracy"] <= 1
        assert point["frechet"] > 0
    with Image.open(tmp_path / "d.png") as image:
        assert image.size[0] > 10 * 84
        assert image.size[1] > 5 * 84
    assert json.loads(read_metadata(tmp_path / "d.png")["tstitch-trt"])["samples"] == 10
    assert "not enough samples to say if 25% of the steps on small is as good as large" in said["claim"]


def test_demo_prints_a_table(run: Command, fashion_bundle: Path, tmp_path: Path) -> None:
    args = ("--samples", 10, "--steps", 4, "--guidance", 1, "--bundle", fashion_bundle, "-o", tmp_path / "d.png")
    outcome = run("demo", *args)
    assert outcome.code == 0, outcome.err
    for part in (
        "Fréchet distance",
        "10 images per row",
        "2 small + 2 large",
        "bias",
        "not enough samples",
        str(tmp_path / "d.png"),
    ):
        assert part in outcome.out


def test_class_names_are_labels(run: Command, fashion_bundle: Path, tmp_path: Path) -> None:
    args = ("--labels", "bag,T-shirt/top", "--steps", 2, "--json", "-o", tmp_path / "a.png")
    said = run("sample", fashion_bundle, *args).json
    assert [(image["label"], image["name"]) for image in said["images"]] == [(8, "Bag"), (0, "T-shirt/top")]
    refused(run("sample", fashion_bundle, "--labels", "bags"), "'bags'", "0 to 9", "did you mean 'Bag'?")


def test_output_is_plain_where_colour_is_not_wanted(bundle: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "NO_COLOR": "1", "FORCE_COLOR": ""}
    args = [sys.executable, "-m", "tstitch_trt.cli", "sample", str(bundle), "--labels", "99"]
    done = subprocess.run(args, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert "\x1b" not in done.stderr
