"""What clients are told of errors."""

from __future__ import annotations

import json
import logging

import pytest

from tstitch_engines import errors
from tstitch_engines.errors import TStitchError
from tstitch_trt.serve.http.errors import ApiError, error_answer, to_api_error

SECRET = "/srv/models/secret.bundle"  # noqa: S105 - a path


def overloaded(retry_after: float | None) -> errors.Overloaded:
    error = errors.Overloaded("the queue is full", hint="later")
    error.retry_after = retry_after
    return error


KINDS = [
    (kind(f"something of {SECRET}", hint=f"look into {SECRET}/x"), status)
    for kind, status in (
        (errors.BadInput, 400), (errors.UnknownName, 400), (errors.BadSchedule, 400), (errors.OutOfProfile, 400),
        (errors.NotFiniteInput, 400), (errors.Unavailable, 400), (errors.NotCalibrated, 400),
        (errors.Busy, 429), (errors.Closed, 503), (errors.Cancelled, 503), (errors.OutOfTime, 504),
        (errors.DeviceLost, 503), (errors.OutOfMemory, 503), (errors.FailedWork, 500), (errors.NotFinite, 500),
        (errors.BadBundle, 500), (errors.BadEngine, 500), (errors.Untrusted, 500), (errors.PairMismatch, 500),
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "status"),
    [*KINDS, (ValueError(SECRET), 500), (MemoryError(SECRET), 500), (KeyError(SECRET), 500)],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_error_has_a_status_and_none_tells_a_path(
    error: Exception, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found, headers, body = error_answer(to_api_error(error, "r-1"))
    assert found == status
    assert b"secret" not in body
    detail = json.loads(body)["error"]
    assert detail["type"] == {400: "invalid_request_error", 429: "rate_limit_error"}.get(status, "server_error")
    assert ("retry-after" in headers) == (status in (429, 503))
    if status == 500:  # the log has the rest, under the id that the client is told
        assert "r-1" in detail["message"]
        assert any(record.fields == {"request_id": "r-1"} for record in caplog.records)  # type: ignore[attr-defined]


def test_every_kind_of_ours_is_in_the_table() -> None:
    """A new one is given its status, not whatever falls to it."""

    def kinds(base: type[TStitchError]) -> set[type[TStitchError]]:
        return {base}.union(*(kinds(each) for each in base.__subclasses__()))

    ours = {kind for kind in kinds(TStitchError) if kind.__module__ == "tstitch_engines.errors"}
    known = {type(error) for error, _ in KINDS} | {TStitchError, errors.Overloaded}
    at_load = {errors.BadCheckpoint, errors.Unsafe, errors.BuildFailed}
    assert ours - known == at_load


def test_a_full_queue_says_when_to_come_again_in_whole_seconds() -> None:
    status, headers, _ = error_answer(to_api_error(overloaded(0.25), ""))
    assert (status, headers["retry-after"], headers["retry-after-ms"]) == (429, "1", "250")


def test_a_budget_that_can_never_be_met_is_not_to_be_tried_again() -> None:
    status, headers, body = error_answer(to_api_error(overloaded(None), ""))
    assert (status, json.loads(body)["error"]["param"]) == (400, "latency_budget_ms")
    assert "retry-after" not in headers


def test_the_parameter_is_found_in_the_message() -> None:
    def param(message: str) -> str | None:
        return to_api_error(errors.BadInput(message, hint=""), "").param

    found = {"steps is 0": "steps", "unknown solver 'x'": "solver", "height 9 is outside": "size",
             "label 12 is out": "class_labels", "the mask is": "mask", "both are given": None}  # fmt: skip
    for text, name in found.items():
        assert param(text) == name
    assert to_api_error(ApiError(404, "no"), "").status == 404
