"""``benchmarks/serving_soak.py``: it finds nothing, and would find what it is for."""

from __future__ import annotations

import base64
import importlib
import io
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

for name in ("httpx", "fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(name)


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("serving_soak")


@pytest.mark.parametrize("seconds", [4, pytest.param(600, marks=pytest.mark.slow)])
def test_a_server_under_mixed_load(soak: ModuleType, fashion_bundle: Path, tmp_path: Path, seconds: int) -> None:
    out = tmp_path / "soak.json"
    places = ["--out", str(out), "--scratch", str(tmp_path)]
    code = soak.main([str(fashion_bundle), "--seconds", str(seconds), "--steps", "6", *places])
    found = json.loads(out.read_text())
    assert (code, found["violations"]) == (0, [])
    assert found["requests"] == sum(found["requests_by_client"].values()) >= seconds
    assert found["answers"]["200"] > 0
    assert found["pictures"] > 0
    assert len(found["uses"]["rows"]) > 10


def test_it_finds_wrong_pictures_and_wrong_answers(soak: ModuleType) -> None:
    want = np.full((4, 4, 1), 100, np.uint8)

    def sent(pixels: np.ndarray) -> str:
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0]).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    soak.check(sent(want), want, {})
    soak.check(sent(want + 1), want, {})  # the rounding of another batch
    with pytest.raises(soak.Wrong, match="differs by 2 levels"):
        soak.check(sent(want - 2), want, {})
    client = soak.Client(None, 0, None, None, soak.Counter())
    error = {"message": "wait\nhint: later", "type": "server_error", "param": None, "code": "overloaded"}
    body = json.dumps({"error": error}).encode()
    assert client._refused(429, {"retry-after": "2"}, body)
    assert not client._refused(200, {}, b"{}")
    for status, headers, content in ((429, {}, body), (500, {}, body), (400, {}, body)):
        with pytest.raises(soak.Wrong):
            client._refused(status, headers, content)
    inside = json.dumps({"error": {**error, "message": "Traceback (most recent call last)"}}).encode()
    with pytest.raises(soak.Wrong, match="inside"):
        client._refused(400, {}, inside, malformed=True)
    with pytest.raises(soak.Wrong, match=r"completed images \[\] of 4"):
        client._events(b"event: ping\n\n", want, {})


def test_what_is_refused(soak: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    for options in (["--seconds", "0"], ["--seconds", "nan"], ["--clients", "0"], ["--steps", "0"]):
        assert soak.main(options) == 2
        assert "hint: e.g. --minutes 10" in capfd.readouterr().err
