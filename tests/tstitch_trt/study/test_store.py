"""Studies in a bundle: they come back as they were, survive a rebuild, and are not taken for those of other weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.hostile import altered, altered_bytes, dumps, only_our_errors
from support.manifests import manifest
from support.studies import calibration, divergence, evaluation, search
from tstitch_engines.bundle.bundle import Bundle, open_bundle, write_bundle
from tstitch_engines.bundle.files import copy_component
from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.errors import BadBundle, BuildFailed
from tstitch_trt.study.budget.choose import _state
from tstitch_trt.study.evaluate.claim import claims_of
from tstitch_trt.study.gather import gather
from tstitch_trt.study.records import Calibration, Evaluation, Search
from tstitch_trt.study.store import differing_weights, load_studies, save_study, weights_of

STUDIES = (calibration(), search(), evaluation({"large:10": {"fid": 20.0}}))


def make(output: Path, weights: dict[str, bytes]) -> Bundle:
    def fill(staging: Path) -> Manifest:
        made = manifest()
        members = {}
        for name, content in weights.items():
            source = output.parent / f"{name}.bin"
            source.write_bytes(b":\0" + b"2" + bytes([len(content)]) + content)  # a graph, and this as its comment
            part = copy_component(source, staging, f"{name}/model.onnx")
            members[name] = msgspec.structs.replace(made.members[name], onnx=(part,))
        return msgspec.structs.replace(made, members=members)

    return write_bundle(output, fill)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make(tmp_path / "a.bundle", {"small": b"small", "large": b"large"})


def test_round_trip(bundle: Bundle) -> None:
    assert load_studies(bundle, Calibration) == []
    here, there = calibration(threads=1), calibration(threads=2, made="2025-01-01T00:00:00Z")
    save_study(bundle, here, key="here")
    save_study(bundle, there, key="there")
    found = search(weights=weights_of(bundle.manifest))
    save_study(bundle, found)
    assert load_studies(bundle, Calibration) == [there, here]  # the newest first
    assert load_studies(bundle, Search) == [found]
    assert open_bundle(bundle.root).manifest == bundle.manifest


def test_a_study_takes_the_place_of_the_one_before(bundle: Bundle) -> None:
    save_study(bundle, search(samples=10))
    save_study(bundle, search(samples=20))
    assert [study.samples for study in load_studies(bundle, Search)] == [20]


def test_a_study_of_fewer_samples_leaves_the_one_with_more(bundle: Bundle) -> None:
    """Whatever is kept, the one with the most samples is used and shown first."""
    weights = weights_of(bundle.manifest)
    for study in (
        search(weights=weights, samples=1000),
        search(weights=weights, samples=16, made="2025-01-01T00:00:00Z"),
    ):
        save_study(bundle, study, key=study.key)
    seeds = tuple(range(16))
    for profile in (
        divergence({}, weights=weights, seeds=seeds),
        divergence({}, weights=weights, made="2025-01-01T00:00:00Z"),
    ):
        save_study(bundle, profile, key=profile.key)
    found = gather(bundle)
    assert [study.samples for study in found.searches] == [1000, 16]
    assert [len(study.seeds) for study in found.divergences] == [16, 2]


def test_studies_survive_a_rebuild_and_are_found_to_be_of_other_weights(bundle: Bundle) -> None:
    study = search(weights=weights_of(bundle.manifest))
    save_study(bundle, study)
    again = make(bundle.root, {"small": b"small", "large": b"retrained"})
    (kept,) = load_studies(again, Search)
    assert kept == study
    assert differing_weights(bundle.manifest, kept) == []
    assert differing_weights(again.manifest, kept) == ["large"]


def test_a_member_only_one_knows_differs(bundle: Bundle) -> None:
    weights = weights_of(bundle.manifest)
    assert differing_weights(bundle.manifest, search(weights={**weights, "base": "x"})) == ["base"]
    assert differing_weights(bundle.manifest, search(weights={"small": weights["small"]})) == ["large"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[:50], "is damaged"),
        (lambda text: text.replace('"schema": 2', '"schema": 9'), "schema version 9"),
        (lambda text: text.replace('"metric"', '"metrik"'), "unknown field 'metrik'"),
        (lambda text: text.replace('"batch": 8', '"batch": "x"'), "field 'batch'"),
        (lambda text: text.replace('"batch": 8', '"batch": 0'), "field 'batch' is 0; allowed is from 1"),
        (lambda text: text.replace('"batch": 8', '"batch": NaN'), "is damaged: it has the number NaN"),
        (
            lambda text: text.replace('"batch": 8', f'"batch": {"9" * 5000}'),
            "is damaged: it has a number of 5,000 digits",
        ),
        (lambda text: "[" * 100_000, "is damaged: it is nested deeper"),
    ],
)
def test_a_damaged_study_is_named_with_the_way_out(bundle: Bundle, damage: Any, words: str) -> None:
    file = save_study(bundle, search())
    file.write_text(damage(file.read_text()))
    with pytest.raises(BadBundle, match=words) as caught:
        load_studies(bundle, Search)
    assert str(file) in caught.value.message
    assert f"rm {file}" in caught.value.hint


def test_an_evaluation_of_schema_1_is_read_and_claims_nothing(bundle: Bundle) -> None:
    """It kept no resamples, and compared every step count with itself in paired metrics."""
    points: dict[str, dict[str, float]] = {
        "large:10": {"fid": 20.0, "latent_error": 0.0},
        "small:4,large:6": {"fid": 20.0, "latent_error": 0.1},
        "large:5": {"fid": 25.0, "latent_error": 0.0},
    }
    made = evaluation(points)
    file = save_study(bundle, made)
    data = json.loads(file.read_text()) | {
        "schema": 1,
        "baseline": json.loads(file.read_text())["points"][0]["setting"],
    }
    del data["margin"], data["references"]
    for point in data["points"]:
        for found in point["measures"].values():
            del found["deviations"], found["bias"]
    file.write_text(json.dumps(data))
    (read,) = load_studies(bundle, Evaluation)
    assert [set(point.measures) for point in read.points] == [{"fid", "latent_error"}] * 2 + [{"fid"}]
    assert [point.measures["fid"].value for point in read.points] == [20.0, 20.0, 25.0]
    (claim,) = claims_of(read, ("small", "large"))
    assert claim.fraction is None
    assert "no resamples to compare" in claim.text("small", "large", "fid")
    file.write_text(json.dumps(data | {"points": [1, {"setting": 2}, {"measures": []}]}))
    with pytest.raises(BadBundle):
        load_studies(bundle, Evaluation)


def test_what_can_not_be_written_leaves_the_study_before(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save_study(bundle, search(samples=10))

    def full(*_: object, **__: object) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tstitch_trt.study.store.atomic_file", full)
    with pytest.raises(BuildFailed, match="No space left"):
        save_study(bundle, search(samples=20))
    assert json.loads(file.read_text())["samples"] == 10


def test_a_study_that_is_removed_meanwhile_is_none(bundle: Bundle) -> None:
    """A link to nothing is listed and can't be read, as what another process removes in between."""
    kept = save_study(bundle, search())
    (kept.parent / f"{kept.stem}-gone.json").symlink_to(bundle.root / "nowhere")
    assert len(load_studies(bundle, Search)) == 1
    assert _state(bundle) == [(kept.name, kept.stat().st_mtime_ns)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_what_could_not_be_read_again_is_not_written(bundle: Bundle, value: float) -> None:
    file = save_study(bundle, calibration(worst_error=0.5))
    with pytest.raises(BuildFailed, match=r"could not be read again.*worst_error") as caught:
        save_study(bundle, calibration(worst_error=value))
    assert "measure it again" in caught.value.hint
    assert json.loads(file.read_text())["worst_error"] == 0.5


def test_a_study_that_is_a_pipe_or_leads_to_itself_is_named(bundle: Bundle) -> None:
    file = save_study(bundle, search())
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(BadBundle, match="a pipe, not a regular file"):
        load_studies(bundle, Search)
    file.unlink()
    file.symlink_to(file.name)
    with pytest.raises(BadBundle, match="Too many levels"):
        load_studies(bundle, Search)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_altered_studies(data: st.DataObject, bundle: Bundle) -> None:
    study = data.draw(st.sampled_from(STUDIES))
    good = msgspec.json.encode(study)
    content = data.draw(st.one_of(altered(json.loads(good)).map(dumps), altered_bytes(good)))
    folder = bundle.root / "studies"
    folder.mkdir(exist_ok=True)
    (folder / f"{study.kind}.json").write_bytes(content)
    only_our_errors(lambda: load_studies(bundle, type(study)))


def test_a_folder_of_studies_that_leads_elsewhere_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (bundle.root / "studies").symlink_to(tmp_path / "elsewhere")
    for work in (lambda: save_study(bundle, search()), lambda: load_studies(bundle, Search)):
        with pytest.raises(BadBundle, match="is a link"):
            work()
    assert not list((tmp_path / "elsewhere").iterdir())
