"""``tstitch-trt build`` with a member of Hugging Face: what the manifest keeps of it, and the command to rebuild."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from support.command import Command, refused
from support.hub_server import running_hub
from support.tiny import TinyPair
from tstitch_engines.bundle.bundle import open_bundle
from tstitch_engines.bundle.manifest import Origin


def test_the_manifest_names_the_commit_and_a_rebuild_needs_no_network(
    capfd: pytest.CaptureFixture[str], tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tiny = Command(capfd), tiny_pair
    exports = os.environ["TSTITCH_TRT_CACHE"]
    content, bundle = tiny.checkpoint("small").read_bytes(), tmp_path / "small.bundle"
    with running_hub(monkeypatch, tmp_path) as hub:
        monkeypatch.setenv("TSTITCH_TRT_CACHE", exports)
        commit = hub.publish("org/tiny", {"ema/small.safetensors": content})
        wanted = f"org/tiny/ema/small.safetensors@{commit}"
        build = ["build", tiny.recipe("small"), "-o", bundle, "--member"]
        found = run(*build, "small=org/tiny/ema/small.safetensors")
        assert found.code == 0, found.err
        assert f"is commit {commit}" in found.err
        assert "downloading 1 file," in found.err
        (source,) = open_bundle(bundle).manifest.members["small"].sources
        assert source.origin == Origin(
            repository="org/tiny",
            revision="main",
            commit=commit,
            path="ema/small.safetensors",
            given="ema/small.safetensors",
        )
        assert f"from org/tiny@main, commit {commit}" in run("inspect", bundle).out
        (told,) = run("inspect", bundle, "--json").json["members"]["small"]["sources"]
        assert told["origin"]["commit"] == commit
        assert str(tmp_path) not in (bundle / "manifest.json").read_text()
        refused(run(*build, "small=org/absent"), "there is no file or folder", "org/absent", "spelling")
        refused(run("verify", bundle, "--member", "small=org/absent"), "there is no file or folder", "org/absent")
    command = shlex.split(open_bundle(bundle).rebuild_command)
    assert f"small={wanted}" in command
    command[2] = str(tiny.recipe("small"))
    again = run(*command[1:])
    assert again.code == 0, again.err
    assert "reused" in again.err
