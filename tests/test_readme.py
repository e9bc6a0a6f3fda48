"""What the README tells people to type works as written."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import msgspec
import pytest
from PIL import Image

from tstitch_export.planning.recipe import load_recipe, recipe_names
from tstitch_trt.cli import COMMANDS, cli
from tstitch_trt.solvers import SOLVERS
from tstitch_trt.study.evaluate.claim import claims_of
from tstitch_trt.study.records import Evaluation

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, env={**os.environ, "PATH": path}, timeout=600
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, fashion_bundle: Path) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(fashion_bundle, folder / "fashion.bundle")  # the commands add studies to it
    return folder


def test_the_python_examples_run(folder: Path) -> None:
    example, serving = blocks("python")
    assert len(example.strip().splitlines()) <= 20
    done = run([sys.executable, "-c", f"{example}\n{serving}\nassert len(pictures) == 10"], folder)
    assert "50/50 large" in done.stdout
    with Image.open(folder / "classes.png") as image:
        assert image.size == (280, 28)


# Need checkpoints that are not here: these lines are held against the options alone.
PUBLISHED = [name for name in recipe_names() if name != "fashion"]
BUNDLES = ["sd.bundle", "sdxl.bundle", "refined.bundle"]


def lines() -> list[str]:
    found = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in found if line.startswith("tstitch-trt ")]


def of_published(line: str) -> bool:
    return any(name in line for name in (*PUBLISHED, *BUNDLES))


def commands() -> list[str]:
    return [line for line in lines() if not of_published(line)]


@pytest.mark.parametrize("line", [line for line in lines() if of_published(line)])
def test_commands_over_published_checkpoints_parse(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, name, *words = shlex.split(line)
    monkeypatch.chdir(folder)
    assert isinstance(cli, click.Group)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    with command.make_context(name, words) as context:
        if name == "build":
            recipe, _ = load_recipe(context.params["source"])
            assert {text.partition("=")[0] for text in context.params["members"]} == recipe.members.keys()
            assert {text.partition("=")[0] for text in context.params["parts"]} <= recipe.parts.keys()


# The last of two options counts: what would take longest draws fewer images and steps.
FEWER = {
    "sample": ["--steps", "4"],
    "bench": ["--steps", "4"],
    "quantise": ["--steps", "10", "--samples", "20"],
    "calibrate": ["--repeats", "1", "--checks", "1"],
    "report": ["--steps", "4"],
}


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_readme_runs(line: str, folder: Path) -> None:
    words = shlex.split(line)
    if words[1] == "build":  # over a symbolic link is not what a user does
        words[words.index("-o") + 1] = "built.bundle"
    if "--schedule" not in words:  # which names its steps
        words += FEWER.get(words[1], [])
    run(words, folder)


def test_every_command_and_solver_is_documented() -> None:
    for name in COMMANDS:
        assert f"tstitch-trt {name}" in README, name
    for name in SOLVERS:
        assert f"`{name}`" in README, name


def test_the_loss_of_8_bits_is_what_was_measured() -> None:
    results = Path(__file__).parent.parent / "benchmarks" / "results" / "quantise" / "quantise.json"
    runs = json.loads(results.read_bytes())["runs"]
    section = README.partition("### 8 bit")[2].partition("\n### ")[0]
    header, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
    levels = [tuple(map(float, part)) for part in re.findall(r"(\d+) to (\d+)", header)]
    assert len(levels) == 4
    assert len(rows) == len(runs) == 3
    for row, made in zip(rows, runs, strict=True):
        by_level = {tuple(level["timesteps"]): level["rel_l2"] for level in made["loss"]}
        figures = [*(by_level[level] for level in levels), max(made["latents"])]
        assert made["precision"] in row
        assert re.findall(r"([\d.]+)%", row) == [f"{100 * x:.1f}" if x < 0.095 else f"{100 * x:.0f}" for x in figures]


def test_the_quality_of_the_built_in_pair_is_what_was_measured() -> None:
    """T-Stitch's table, what is said of it, and the large member alone in fewer steps."""
    results = Path(__file__).parent.parent / "benchmarks" / "results" / "study"
    studies = [json.loads(file.read_bytes()) for file in results.glob("evaluation-*.json")]
    study = msgspec.convert(max(studies, key=lambda study: study["samples"]), Evaluation)
    points = {point.setting.schedule: point for point in study.points}
    section = " ".join(README.partition("## The built-in pair")[2].partition("\n## ")[0].split())
    assert f"{study.samples:,} samples per point" in section

    def distance(schedule: str) -> str:
        found = points[schedule].measures["fid"]
        return f"{found.value:.1f} [{found.low:.1f}, {found.high:.1f}]"

    alone = points["large:50"]
    (claim,) = [claim for claim in claims_of(study, ("small", "large")) if claim.setting.steps == 50]
    trials = {round(50 * trial.fraction): trial for trial in claim.trials}
    for small in range(0, 51, 5):
        first = points[f"small:{small},large:{50 - small}" if 0 < small < 50 else "small:50" if small else "large:50"]
        last = f"large:{50 - small},small:{small}" if 0 < small < 50 else first.setting.schedule
        found = trials[small].judgement if small else None
        said = "" if found is None else f"{found.difference:+.2f}, at most {found.upper:+.2f}"
        rates = [first.measures[name].value for name in ("precision", "recall")]
        cells = [
            f"{2 * small}%", distance(first.setting.schedule), said, *(f"{rate:.2f}" for rate in rates),
            f"{first.measures['accuracy'].value:.1%}", f"{first.ms / first.batch:.1f}", f"{alone.ms / first.ms:.2f}",
            distance(last),
        ]  # fmt: skip
        assert f"| {' | '.join(cells)} |".replace("  ", " ") in section
    assert claim.fraction is not None
    assert claim.stopped is not None
    passed, stopped = trials[round(50 * claim.fraction)].judgement, claim.stopped.judgement
    assert passed is not None
    assert stopped is not None
    percent = f"{claim.fraction:.0%}".replace("%", " %")
    assert f"up to {percent} of the steps on the small member the distance is no worse" in section
    assert f"at most {passed.upper:.2f} more, with a margin of {passed.margin:.2f}" in section
    assert f"At {claim.stopped.fraction:.0%} it may be {stopped.upper:.2f} more".replace("%", " %") in section
    assert f"{claim.speedup:.2f} times as fast" in section
    fewer = sorted((p for p in study.points if set(p.setting.members) == {"large"}), key=lambda p: -p.setting.steps)
    rows = (
        " | ".join(["steps of the large member alone", *(f"{p.setting.steps}" for p in fewer)]),
        " | ".join(["distance", *(f"{p.measures['fid'].value:.1f}" for p in fewer)]),
        " | ".join(["speed-up", *(f"{alone.ms / p.ms:.2f}" for p in fewer)]),
    )
    for row in rows:
        assert f"| {row} |" in section


def test_cost_budgets_and_peers_are_what_was_measured() -> None:
    results = Path(__file__).parent.parent / "benchmarks" / "results"
    section = " ".join(README.partition("## The built-in pair")[2].partition("\n## ")[0].split())
    (file,) = (results / "study").glob("calibration-*.json")
    cost, budget = json.loads(file.read_bytes()), json.loads((results / "budget.json").read_bytes())
    assert (
        f"a median error of {100 * cost['median_error']:.1f} % and a worst of {100 * cost['worst_error']:.0f} %"
        in section
    )
    assert f"`calibrate --repeats {cost['repeats']} --checks {len(cost['checks'])}`" in section
    assert budget["calibration"]["made"] == cost["made"]
    assert f"Single runs are not as regular, {100 * budget['median_error']:.0f} % off in the median" in section
    used = f"{100 * budget['budget_used']:.0f} % of the budget"
    assert f"{budget['met']} of {budget['runs']} random budgets were met, {used}" in section
    peers = json.loads((results / "peers" / "peers.json").read_bytes())
    slower = {c["name"]: [t["speedup_of_ours"] for t in c["trajectories"]] for c in peers["contenders"][1:]}
    for name, words in (
        ("torch-eager", "PyTorch eager takes"),
        ("torch-compile", "`torch.compile`"),
        ("diffusers", "a diffusers loop"),
    ):
        assert f"{words} {min(slower[name]):.2f} to {max(slower[name]):.2f}" in section
    assert all(t["relative_difference"] < 2e-6 for c in peers["contenders"] for t in c["trajectories"])


def test_the_pictures_exist() -> None:
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README) + re.findall(r"\]\(((?!https?:)[^)]+)\)", README):
        assert (Path(__file__).parent.parent / path).is_file(), path


def test_the_full_size_builds_are_what_was_measured() -> None:
    results = Path(__file__).parent.parent / "benchmarks" / "results" / "build-unets.json"
    parts = json.loads(results.read_bytes())["parts"]
    section = README.partition("### Stable Diffusion")[2].partition("\n### ")[0]
    rows = re.findall(r"^\| .* \| (\d+)M \| (\d+) s \| (\d+) s \| ([\d.]+) and ([\d.]+) GiB \|$", section, re.MULTILINE)
    for row, name in zip(rows, ("bksdm-tiny", "sd15", "ssd1b"), strict=True):
        half, full = parts[f"{name}-fp16"], parts[f"{name}-fp32"]
        times = [f"{half[phase]['work_seconds']:.0f}" for phase in ("export", "tensorrt-rtx")]
        most = [max(phase["peak_bytes"] for phase in part.values() if "peak_bytes" in phase) for part in (half, full)]
        assert list(row) == [
            f"{half['weights']['parameters'] / 1e6:.0f}", *times, *(f"{peak / 2**30:.1f}" for peak in most),
        ]  # fmt: skip


def test_every_family_is_documented() -> None:
    from tstitch_export.families import FAMILIES

    for name in FAMILIES:
        assert f"`{name}`" in README, name
