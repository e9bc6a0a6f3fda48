"""A headless Chromium, and what a page asked of the network and of the reader's patience while it was open."""

from __future__ import annotations

import importlib.util
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

__all__ = ["Watched", "browser_page", "letter_heights", "pixels"]

_SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Watched:
    """``page`` is playwright's. ``requests``: every URL asked for; ``failed``: those not answered with success;
    ``errors``: what the page logged as errors or threw."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.requests: list[str] = []
        self.failed: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("requestfailed", lambda request: self.failed.append(f"{request.url}: {request.failure}"))
        page.on("response", lambda answer: self._answered(answer.url, answer.status))
        page.on("console", lambda message: self._said(message.type, message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _answered(self, url: str, status: int) -> None:
        if status >= 400:
            self.failed.append(f"{url}: {status}")

    def _said(self, kind: str, text: str) -> None:
        if kind == "error":
            self.errors.append(text)


@contextmanager
def browser_page(**options: Any) -> Iterator[Watched]:
    """A page in Debian's Chromium. Skips where Chromium or playwright is not installed."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed (pip install playwright)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=list(_SWITCHES))
        try:
            yield Watched(browser.new_context(**options).new_page())
        finally:
            browser.close()


def pixels(png: bytes) -> NDArray[np.uint8]:
    """A screenshot as uint8 ``[H,W,3]``."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def letter_heights(texts: Any) -> list[float]:
    """The font size in CSS pixels of each text of an SVG, as the page shows it. ``texts``: playwright's locator."""
    found: list[float] = texts.evaluate_all(
        """texts => texts.map(text => {
            const svg = text.ownerSVGElement, scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
            return scale * parseFloat(getComputedStyle(text).fontSize);
        })"""
    )
    return found
