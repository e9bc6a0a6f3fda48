"""The workflows of the public host, and the wheels that they make."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def jobs(name: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())["jobs"]
    return read


def test_the_host_can_read_them() -> None:
    """By its own schema, as check-jsonschema ships it."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_ci_runs_the_script_that_everybody_can_run() -> None:
    (job,) = jobs("ci.yml").values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_they_may_read_and_no_more(path: Path) -> None:
    """Only publishing asks for an identity, and only for a tag; every action has a version."""
    whole = yaml.safe_load(path.read_text())
    assert whole["permissions"] == {"contents": "read"}
    granted = {name: job["permissions"] for name, job in whole["jobs"].items() if "permissions" in job}
    assert granted == ({"publish": {"id-token": "write"}} if path.name == "wheels.yml" else {})
    for job in whole["jobs"].values():
        for step in job["steps"]:
            assert re.search(r"@(v\d+|release/v\d+)$", step.get("uses", "@v1"))
    if "publish" in granted:
        assert "startsWith(github.ref, 'refs/tags/v')" in whole["jobs"]["publish"]["if"]
        assert set(whole["jobs"]["publish"]["needs"]) == whole["jobs"].keys() - {"publish"}


def test_wheels_are_made_for_the_versions_that_are_promised() -> None:
    """cibuildwheel reads its own table: two architectures, glibc only, without free-threaded Python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = re.findall(r"Python :: 3\.(\d+)$", "\n".join(project["classifiers"]), re.MULTILINE)
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers", "--platform", "linux"]
    for machine in ("x86_64", "aarch64"):
        done = subprocess.run([*command, "--archs", machine, ROOT], capture_output=True, text=True)
        assert done.stdout.split() == [f"cp3{version}-manylinux_{machine}" for version in versions], done.stderr
    assert jobs("wheels.yml")["wheels"]["strategy"]["matrix"]["runner"] == ["ubuntu-24.04", "ubuntu-24.04-arm"]
