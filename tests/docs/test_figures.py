"""The figures of the pages are those that were measured (benchmarks/results), and lists are whole."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tstitch_trt.serve import triton
from tstitch_trt.serve.ray_app import RayOptions
from tstitch_trt.study.evaluate.claim import claims_of
from tstitch_trt.study.noninferiority import Judgement, judge
from tstitch_trt.study.records import Evaluation, Point

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def section(page: str, title: str = "") -> str:
    """The part of a page under the heading ``title``, or all of it."""
    text = (ROOT / "docs" / page).read_text()
    if not title:
        return text
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,2}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"{page} has no heading {title!r}"
    return found[2]


def one_line(text: str) -> str:
    return " ".join(text.split())


def result(name: str) -> Any:
    return json.loads((RESULTS / name).read_bytes())


PAIR = "benchmarks/built-in-pair.md"


@pytest.fixture(scope="module")
def study() -> Evaluation:
    """The evaluation of the most samples."""
    found = [json.loads(file.read_bytes()) for file in (RESULTS / "study").glob("evaluation-*.json")]
    return msgspec.convert(max(found, key=lambda study: study["samples"]), Evaluation)


def judged(study: Evaluation, point: Point) -> Judgement:
    """Against the large member alone in 50 steps."""
    (alone,) = [other for other in study.points if other.setting.schedule == "large:50"]
    found = judge("fid", point.measures["fid"], alone.measures["fid"], samples=study.samples, margin=study.margin)
    assert found is not None
    return found


def test_quality_by_fraction(study: Evaluation) -> None:
    points = {point.setting.schedule: point for point in study.points}
    page = one_line(section(PAIR, "Quality by the small member's share"))
    assert f"{study.samples:,} samples per point" in page

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
        rates = [f"{first.measures[name].value:.2f}" for name in ("precision", "recall")]
        share, accuracy = f"{2 * small}%", f"{first.measures['accuracy'].value:.1%}"
        cells = [
            share, distance(first.setting.schedule), said, f"{first.ms / first.batch:.1f}",
            f"{alone.ms / first.ms:.2f}", distance(last),
        ]  # fmt: skip
        assert f"| {' | '.join(cells)} |".replace("  ", " ") in page
        assert f"| {' | '.join([share, *rates, accuracy])} |" in page
    assert claim.fraction is not None
    assert claim.stopped is not None
    passed, stopped = trials[round(50 * claim.fraction)].judgement, claim.stopped.judgement
    assert passed is not None
    assert stopped is not None
    percent = f"{claim.fraction:.0%}".replace("%", " %")
    assert f"up to {percent} of the steps on the small member the distance is no worse" in page
    assert f"at most {passed.upper:.2f} more, with a margin of {passed.margin:.2f}" in page
    assert f"At {claim.stopped.fraction:.0%} it may be {stopped.upper:.2f} more".replace("%", " %") in page
    assert f"{claim.speedup:.2f} times as fast" in page
    for other in ("benchmarks/index.md", "choosing.md"):
        text = one_line(section(other))
        assert percent in text
        assert f"{claim.speedup:.2f} times as fast" in text


def test_fewer_steps(study: Evaluation) -> None:
    page = section(PAIR, "Fewer steps of the large member")
    fewer = sorted((p for p in study.points if set(p.setting.members) == {"large"}), key=lambda p: -p.setting.steps)
    assert fewer[0].setting.steps == 50
    rows = (
        " | ".join(["steps of the large member alone", *(f"{p.setting.steps}" for p in fewer)]),
        " | ".join(["distance", *(f"{p.measures['fid'].value:.1f}" for p in fewer)]),
        " | ".join(["speed-up", *(f"{fewer[0].ms / p.ms:.2f}" for p in fewer)]),
    )
    for row in rows:
        assert f"| {row} |" in page
    (twenty,) = [p for p in fewer if p.setting.steps == 20]
    assert judged(study, twenty).verdict == "no worse"
    for text in (page, section("choosing.md")):
        assert f"{fewer[0].ms / twenty.ms:.1f} times as fast" in one_line(text)
    (fifteen,) = [p for p in fewer if p.setting.steps == 15]
    slow = f"15 steps, {fewer[0].ms / fifteen.ms:.1f} times as fast, may be {judged(study, fifteen).upper:.1f} worse"
    assert slow in one_line(page)


def test_the_table_of_the_readme(study: Evaluation) -> None:
    readme = (ROOT / "README.md").read_text().partition("## What was measured")[2].partition("\n## ")[0]
    assert f"{study.samples:,} samples per row" in readme
    points = {point.setting.schedule: point for point in study.points}
    header, _, *rows = [line for line in readme.splitlines() if line.startswith("|")]
    assert header == "| steps | distance | difference | verdict | speed-up |"
    assert len(rows) >= 7
    alone = points["large:50"]
    for row in rows:
        steps = row.split("|")[1].strip()
        point = points[steps.replace(", ", ",").replace(" ", ":")]
        found = judged(study, point)
        said = ["", ""]
        if point is not alone:
            said = [f"{found.difference:+.2f}, at most {found.upper:+.2f}", found.verdict]
        cells = [steps, f"{point.measures['fid'].value:.1f}", *said, f"{alone.ms / point.ms:.2f}"]
        assert row == f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")
        assert f"is below {found.margin:.2f}, which is {study.margin:.0%}".replace("%", " %") in one_line(readme)


def test_the_pair() -> None:
    torch = pytest.importorskip("torch")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from tstitch_export.families.dit.model import DiT
    from tstitch_export.train.fashion import MEMBERS

    page = section(PAIR)
    flops, parameters = {}, {}
    for name, config in MEMBERS.items():
        member = DiT(config)
        parameters[name] = sum(p.numel() for p in member.parameters()) / 1e6
        # fused attention on the CPU is not counted, its products are
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            member(torch.zeros(1, 1, 28, 28), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
        flops[name] = counter.get_total_flops() / 1e6
    small, large = flops["small"], flops["large"]
    assert f"| {small:.1f} MFLOP | {large:.1f} MFLOP ({large / small:.0f}x) |" in page
    assert f"| {parameters['small']:.2f}M | {parameters['large']:.1f}M |" in page
    with np.load(ROOT / "export/tstitch_export/pairs/fashion/reference.npz") as reference:
        assert f"a classifier ({100 * float(reference['accuracy']):.1f} % on the test split)" in one_line(page)


def test_other_orders_and_solvers() -> None:
    page = section(PAIR)
    studies = [json.loads(file.read_bytes()) for file in (RESULTS / "study").glob("evaluation-*.json")]
    by_samples = {study["samples"]: study["points"] for study in studies}
    fid = {point["setting"]["schedule"]: point["measures"]["fid"]["value"] for point in by_samples[768]}
    assert f"768 samples, in which the large member alone has {fid.pop('large:50'):.1f}" in one_line(page)
    rows = re.findall(r"^\| (.+) \| \d+ % \| ([\d.]+) \|$", page, re.MULTILINE)
    names = {",".join(["small:5,large:5"] * 5): "turns of five steps, small first"}
    assert dict(rows) == {names.get(schedule, f"`{schedule}`"): f"{value:.1f}" for schedule, value in fid.items()}
    cells: dict[str, dict[int, list[str]]] = {}
    for point in by_samples[256]:  # the large member alone, then 40 %
        setting = point["setting"]
        both = cells.setdefault(setting["solver"], {}).setdefault(setting["steps"], [])
        both.append(f"{point['measures']['fid']['value']:.1f}")
    assert len(cells) == 3
    for solver, by_steps in cells.items():
        assert f"| `{solver}` | {' | '.join(' / '.join(by_steps[steps]) for steps in (10, 20, 50, 100))} |" in page


def test_the_search() -> None:
    page = one_line(section(PAIR, "Fewer steps of the large member"))
    (file,) = (RESULTS / "study").glob("search-*.json")
    search = json.loads(file.read_bytes())
    points = {point["setting"]["schedule"]: point for point in search["points"]}
    assert f"{len(points)} candidates of 10, 20 and 50 steps, {search['samples']:,} samples" in page
    for schedule, words in (("small:8,large:12", " for eight images"), ("large:20", ""), ("large:50", "")):
        found = points[schedule]
        assert found["front"]
        assert f"{found['quality']['value']:.1f} at {found['cost_ms']:,.0f} ms{words}" in page
    dropped = [point for point in points.values() if point["dropped"]]
    rings = [point["dropped"] for point in points.values() if point["kind"] == "large-small-large"]
    assert all(rings)
    assert f"{len(dropped)} candidates were dropped early, all {len(rings)} large-small-large ones" in page


def test_the_simulation() -> None:
    page = section("benchmarks/serving-simulation.md")
    parts = result("serving-simulation.json")["parts"]
    checked = 0
    columns: list[str] = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| part |"):
            columns = cells
        if not line.startswith("| `") or cells[0].strip("`") in ("DeadlineFirst", "FirstCome", "LargestBatch"):
            continue
        for name in re.findall(r"`([a-z][\w.-]+)`", cells[0]):
            part = parts[name]
            for column, cell in zip(columns, cells, strict=True):
                if column in ("p50", "p95", "p99"):
                    assert cell == f"{part[column]:.2f}", line
                elif column == "within":
                    assert cell == f"{part['within_limit'] / part['requests']:.1%}".replace(".0%", "%").replace(
                        "%", " %"
                    )
                elif column == "busiest device over the mean":
                    assert cell == f"{part['busiest']:.2f}", line
                elif column in ("refused", "late", "sent again"):
                    key = {"late": "missed", "sent again": "retried"}.get(column, column)
                    assert cell == f"{part[key]:,}", line
                checked += 1
    assert checked > 80
    for policy in ("DeadlineFirst", "FirstCome", "LargestBatch"):
        part = parts[f"policy-{policy}"]
        assert f"| `{policy}` | {part['p50']:.2f} | {part['p95']:.2f} |" in page
    check = result("serving-simulation-check.json")
    names = {"throughput": "images a second", "batch": "lanes of a batch"}
    for key, median in check["median_error"].items():
        worst = max(abs(window["error"][key]) for window in check["windows"])
        assert f"| {names.get(key, key)} | {100 * median:.1f} % | {100 * worst:.1f} % |" in page


def test_predicted_times_and_budgets() -> None:
    page = one_line(section(PAIR, "Predicted and measured time"))
    (file,) = (RESULTS / "study").glob("calibration-*.json")
    cost, budget = json.loads(file.read_bytes()), result("budget.json")
    median, worst = 100 * cost["median_error"], 100 * cost["worst_error"]
    assert f"a median error of {median:.1f} % and a worst of {worst:.0f} %" in page
    assert f"`calibrate --repeats {cost['repeats']} --checks {len(cost['checks'])}`" in page
    assert budget["calibration"]["made"] == cost["made"]
    assert f"Single runs are not as regular, {100 * budget['median_error']:.0f} % off in the median" in page
    met = f"{budget['met']} of {budget['runs']}"
    assert f"{met} random budgets were met, {100 * budget['budget_used']:.0f} % of the budget" in page
    assert f"{met} met" in section("benchmarks/index.md")


def test_peers() -> None:
    page = one_line(section(PAIR, "Beside PyTorch and diffusers"))
    peers = result("peers/peers.json")
    slower = {c["name"]: [t["speedup_of_ours"] for t in c["trajectories"]] for c in peers["contenders"][1:]}
    for name, words in (
        ("torch-eager", "PyTorch eager takes"),
        ("torch-compile", "`torch.compile`"),
        ("diffusers", "a diffusers loop"),
    ):
        assert f"{words} {min(slower[name]):.2f} to {max(slower[name]):.2f}" in page
    eager = slower["torch-eager"]
    assert f"PyTorch eager takes {min(eager):.2f} to {max(eager):.2f} times" in section("benchmarks/index.md")
    assert all(t["relative_difference"] < 2e-6 for c in peers["contenders"] for t in c["trajectories"])


def test_what_the_runtime_adds() -> None:
    page = one_line(section(PAIR, "What the runtime adds"))
    one, both = result("latency.json"), result("latency-all-threads.json")
    small, large = (member["step_ms"] for member in one["members"])
    assert f"| {small:.2f} ms | {large:.2f} ms ({large / small:.0f}x) |" in section(PAIR)
    assert f"over the sum of bare engine calls is {one['overhead']:.3f}" in page
    ratios = [t["ms"] / t["predicted_ms"] for t in one["trajectories"]]
    assert f"take {min(ratios):.2f} to {max(ratios):.2f} times what the members' bare times predict" in page
    assert f"the overhead is {both['overhead']:.2f} over all" in page
    added = f"{100 * (one['overhead'] - 1):.1f} %"
    assert added in section("benchmarks/index.md")
    assert added in section("concepts/lanes.md")


def test_full_size_builds() -> None:
    parts = result("build-unets.json")["parts"]
    rows = re.findall(
        r"^\| .* \| (\d+)M \| (\d+) s \| (\d+) s \| ([\d.]+) and ([\d.]+) GiB \|$",
        section("benchmarks/index.md", "Building full-size UNets"), re.MULTILINE,
    )  # fmt: skip
    for row, name in zip(rows, ("bksdm-tiny", "sd15", "ssd1b"), strict=True):
        half, full = parts[f"{name}-fp16"], parts[f"{name}-fp32"]
        times = [f"{half[phase]['work_seconds']:.0f}" for phase in ("export", "tensorrt-rtx")]
        most = [max(phase["peak_bytes"] for phase in part.values() if "peak_bytes" in phase) for part in (half, full)]
        assert list(row) == [
            f"{half['weights']['parameters'] / 1e6:.0f}", *times, *(f"{peak / 2**30:.1f}" for peak in most),
        ]  # fmt: skip


def test_the_loss_of_8_bits() -> None:
    runs = result("quantise/quantise.json")["runs"]
    table = section("how-to/8-bit.md", "What it costs")
    header, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
    levels = [tuple(map(float, part)) for part in re.findall(r"(\d+) to (\d+)", header)]
    assert len(levels) == 4
    assert len(rows) == len(runs) == 3
    for row, made in zip(rows, runs, strict=True):
        by_level = {tuple(level["timesteps"]): level["rel_l2"] for level in made["loss"]}
        figures = [*(by_level[level] for level in levels), max(made["latents"])]
        assert made["precision"] in row
        assert re.findall(r"([\d.]+)%", row) == [f"{100 * x:.1f}" if x < 0.095 else f"{100 * x:.0f}" for x in figures]


def test_the_server() -> None:
    page = section("benchmarks/index.md")
    gain = result("serving-mixed.json")["mixes"][0]["gain"]
    first, *others = gain["litserve"].values()
    assert f"{float(first.removeprefix('at least ')):.1f} times the rate of LitServe" in page
    assert f"{min(others)} to {max(others)} times" in page
    _, *alone = gain["single"].values()
    assert f"{min(alone)} to {max(alone)} times the rate of one request at a time" in page
    soak = result("serving-soak.json")
    assert soak["violations"] == []
    assert f"no wrong picture of {soak['pictures']:,}" in page


def test_the_lists_of_inputs() -> None:
    table = section("how-to/triton.md", "Ask")
    inputs = [*triton._CLASSES, *triton._TEXTS, *triton._ALL, *triton._PICTURES, *triton._SUBMITTED]
    for kind in {each.kind for each in inputs}:
        row = re.search(rf"^\| {kind.replace('STRING', 'BYTES')} \| (.*) \|$", table, re.MULTILINE)
        assert row is not None
        assert set(re.findall(r"`(\w+)`", row[1])) == {each.name for each in inputs if each.kind == kind}
    fields = re.findall(r"^\| (.+?) \|", section("how-to/ray.md", "Options"), re.MULTILINE)
    assert set(re.findall(r"`(\w+)(?:: \w+)?`", " ".join(fields))) == set(RayOptions.__struct_fields__)


def test_the_list_of_extras() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    table = re.findall(r"^\| (.+?) \|", section("start/class-pair.md", "Extras"), re.MULTILINE)
    assert {name for cell in table for name in re.findall(r"`([\w-]+)`", cell)} == set(extras)
