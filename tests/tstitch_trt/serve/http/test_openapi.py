"""The OpenAPI document is true of every answer, whatever is sent: schemathesis makes the requests of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from schemathesis.transport.serialization import Binary

from support.http_server import Server, picture_file, running
from tstitch_trt.serve.http.limits import HttpLimits, HttpSettings

OPERATIONS = ["GET /healthz", "GET /readyz", "GET /v1/models", "GET /v1/models/{model}", "POST /admin/reload",
              "POST /v1/images/edits", "POST /v1/images/generations"]  # fmt: skip


@pytest.fixture(scope="module")
def document(server: Server) -> Iterator[Any]:
    """With few steps, so that every request is soon done."""
    pictures = [picture_file(np.zeros((8, 8, 3), np.uint8)), picture_file(np.zeros((8, 8, 4), np.uint8)), b"no picture"]
    schemathesis.openapi.format("binary", st.sampled_from(pictures).map(Binary))
    limits = HttpLimits(steps=10, images=2)
    with running(server.engine, HttpSettings(limits=limits, reload=lambda: ["tiny"])) as client:
        yield schemathesis.openapi.from_url(f"{str(client.base_url).rstrip('/')}/openapi.json")


def test_every_operation_is_in_the_document(document: Any) -> None:
    found = [operation.ok().label for operation in document.get_all_operations()]
    assert sorted(found) == OPERATIONS


WRONG = [label for label in OPERATIONS if label.startswith("POST /v1")]  # those of which something can be wrong


@pytest.mark.parametrize(
    ("label", "mode"),
    [*((label, "positive") for label in OPERATIONS), *((label, "negative") for label in WRONG)],
)
def test_answers_are_as_the_document_says(document: Any, label: str, mode: str) -> None:
    """What it can't say, such as that of fraction and schedule one is given, is the reason for a 400 on what is right
    by it."""
    (operation,) = (each.ok() for each in document.get_all_operations() if each.ok().label == label)

    @settings(
        max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=GenerationMode(mode)))
    def answer(case: Any) -> None:
        # A form has texts only, so that a list of one number is that number
        form = [negative_data_rejection] if case.media_type == "multipart/form-data" else []
        case.call_and_validate(excluded_checks=[positive_data_acceptance, *form])

    answer()
