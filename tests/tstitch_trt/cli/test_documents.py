"""Documents of ``--json``: each command has a schema. ``support.command`` holds what commands print against it."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from support.command import Command, check_document
from tstitch_trt.cli._defaults import option_key
from tstitch_trt.cli._documents import DOCUMENTS, json_schema
from tstitch_trt.cli.config import every_command
from tstitch_trt.images.write import METADATA_KEY


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def test_every_command_with_json_has_a_document() -> None:
    commands = {" ".join(path) for path, command in every_command() if "json" in map(option_key, command.params)}
    assert {name.partition(" --")[0] for name in DOCUMENTS} == commands
    jsonschema.Draft202012Validator.check_schema(json_schema())


def test_the_schema_holds_for_what_is_printed_and_for_nothing_else(
    run: Command, fashion_bundle: Path, tmp_path: Path
) -> None:
    drawn = run("sample", fashion_bundle, "--steps", 2, "-o", tmp_path / "a.png", "--json").json
    check_document(["sample"], drawn)
    for change in ({"steps": "2"}, {"images": [{"label": 3}]}, {"schedule": {}}, {"total_ms": None}):
        with pytest.raises(jsonschema.ValidationError):
            check_document(["sample"], drawn | change)
    with pytest.raises(jsonschema.ValidationError):
        check_document(["inspect"], drawn)
    assert {image["name"] for image in drawn["images"]} >= {"Bag", "Sneaker"}
    assert "budget" not in drawn
    assert "failed" not in drawn
    assert run("inspect", fashion_bundle, "--json").json["members"].keys() == {"small", "large"}
    for words in (["build", "--list"], ["cache", "list"], ["doctor"], ["config"]):
        assert run(*words, "--json").code == 0


def test_pictures_keep_the_same_settings(run: Command, fashion_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    drawn = run("sample", fashion_bundle, "--labels", 3, "--steps", 2, "-o", tmp_path / "a.png", "--json").json
    with Image.open(tmp_path / "a.png") as picture:
        kept = json.loads(picture.info[METADATA_KEY])
    assert kept == {name: value for name, value in drawn.items() if name not in ("files", "latents")}
