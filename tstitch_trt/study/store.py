"""Studies in a bundle: one JSON file each under ``studies/``, written whole or not at all.

They may be deleted. ``write_bundle`` keeps them when a bundle is replaced; one of other weights is stale then.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tstitch_engines.bundle.bundle import STUDIES, Bundle
from tstitch_engines.bundle.decode import DecodeError, convert
from tstitch_engines.bundle.identity import model_digest
from tstitch_engines.bundle.manifest import Manifest
from tstitch_engines.bundle.read import STUDY_BYTES, decode_json, read_bounded
from tstitch_engines.checks import check_text
from tstitch_engines.errors import BadBundle, BuildFailed
from tstitch_trt.files import atomic_file
from tstitch_trt.study.machine import describe_machine
from tstitch_trt.study.records import PAIRED, STUDY_SCHEMA, Study

__all__ = ["check_command", "differing_weights", "load_studies", "now", "provenance", "save_study", "weights_of"]

_log = logging.getLogger(__name__)

S = TypeVar("S", bound=Study)


def check_command(value: object, what: str) -> str:
    """The command line that repeats a study."""
    return check_text(value, what, example="tstitch-trt calibrate BUNDLE")


def provenance(manifest: Manifest, command: str) -> dict[str, Any]:
    """The fields that every ``Study`` has: made now, on this machine, by ``command``."""
    return {
        "bundle": manifest.name,
        "weights": weights_of(manifest),
        "machine": describe_machine(),
        "command": command,
        "made": now(),
    }


def now() -> str:
    """The time in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def weights_of(manifest: Manifest) -> dict[str, str]:
    """The sha256 of each member's ONNX model, by member."""
    return {name: model_digest(member.onnx) for name, member in manifest.members.items()}


def differing_weights(manifest: Manifest, study: Study) -> list[str]:
    """The members whose weights differ between the study and the manifest, or that only one of them has."""
    here = weights_of(manifest)
    return [name for name in {**study.weights, **here} if study.weights.get(name) != here.get(name)]


def save_study(bundle: Bundle, study: Study, *, key: str = "") -> Path:
    """Writes ``study`` into the bundle, in place of the one of the same kind and ``key``. Returns the file.

    Raises ``BuildFailed`` where the bundle can't be written, or the study could not be read again: a measurement that
    is NaN, say, for which JSON has no word.
    """
    content = msgspec.json.format(msgspec.json.encode(study), indent=2) + b"\n"
    place = _folder(bundle) / f"{study.kind}{f'-{key}' if key else ''}.json"
    try:
        _decode(place, content, type(study))
    except BadBundle as error:
        raise BuildFailed(
            f"the {study.kind} was not kept, because it could not be read again: {error.message}",
            hint="measure it again; a number that is none comes from a member that gives such latents",
        ) from error
    try:
        place.parent.mkdir(exist_ok=True)
        with atomic_file(place) as file:
            file.write(content)
    except OSError as error:
        raise BuildFailed(
            f"{place} can't be written: {error}", hint="make the bundle writable, or measure on a copy of it"
        ) from error
    return place


def load_studies(bundle: Bundle, record: type[S]) -> list[S]:
    """All studies of a kind in the bundle, of any weights and machine, the newest first.

    Those of schema 1 are read as what they say still. Raises ``BadBundle`` for a file that is damaged or of a newer
    version.
    """
    folder = _folder(bundle)
    files = [folder / f"{record.kind}.json", *sorted(folder.glob(f"{record.kind}-*.json"))] if folder.is_dir() else []
    found = [study for path in files if (study := _read(path, record)) is not None]
    return sorted(found, key=lambda study: study.made, reverse=True)


def _folder(bundle: Bundle) -> Path:
    """The bundle's folder of studies. Raises ``BadBundle`` where it leads out of the bundle."""
    folder = bundle.root / STUDIES
    if folder.is_symlink():
        raise BadBundle(
            f"{folder} is a link; allowed is a folder of the bundle's own",
            hint=f"do not trust who made the bundle; remove the link: rm {folder}",
        )
    return folder


def _read(path: Path, record: type[S]) -> S | None:
    """``None`` where there is no such file, or no longer."""
    try:
        content = read_bounded(path, STUDY_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, DecodeError) as error:
        raise BadBundle(f"{path} is damaged: {error}", hint=_fix(path)) from None
    return _decode(path, content, record)


def _fix(path: Path) -> str:
    return f"measure it again, or remove it: rm {path}"


def _decode(path: Path, content: bytes, record: type[S]) -> S:
    fix = _fix(path)
    try:
        data = decode_json(content)
    except DecodeError as error:
        raise BadBundle(f"{path} is damaged: {error}", hint=fix) from None
    schema = data.get("schema") if isinstance(data, Mapping) else None
    if schema == 1:
        data = _from_schema_1(data)
    elif schema != STUDY_SCHEMA:
        raise BadBundle(f"{path} has schema version {schema!r}; this version reads 1 to {STUDY_SCHEMA}", hint=fix)
    try:
        return convert(data, record, word="field")
    except DecodeError as error:
        raise BadBundle(f"{path}: {error.message}", hint=fix) from None


def _from_schema_1(data: Mapping[str, Any]) -> dict[str, Any]:
    """A record without paired resamples. Its ``baseline`` was the last member alone in as many steps as each setting
    has, so its paired metrics of different step counts can't be compared: those of fewer than the most are left out."""
    found = {key: value for key, value in data.items() if key != "baseline"} | {"schema": STUDY_SCHEMA}
    if "baseline" in data and isinstance(points := data.get("points"), list):
        most = max((_steps(point) for point in points), default=0)
        found["points"] = [point if _steps(point) == most else _unpaired(point) for point in points]
    return found


def _steps(point: Any) -> int:
    setting = point.get("setting") if isinstance(point, Mapping) else None
    steps = setting.get("steps") if isinstance(setting, Mapping) else None
    return steps if isinstance(steps, int) else 0


def _unpaired(point: Any) -> Any:
    measures = point.get("measures") if isinstance(point, Mapping) else None
    if not isinstance(measures, Mapping):
        return point
    return {**point, "measures": {name: value for name, value in measures.items() if name not in PAIRED}}
