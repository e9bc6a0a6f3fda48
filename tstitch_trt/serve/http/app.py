"""The application: routes over an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tstitch_engines.needs import require
from tstitch_trt.serve.http.limits import HttpSettings

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI

__all__ = ["create_app"]


def create_app(engine: Any, settings: HttpSettings, *, extra_routes: Sequence[APIRouter] = ()) -> FastAPI:
    """The server of ``engine``, which stays the caller's to warm up, drain and close.

    ``extra_routes``: further routes, under the same guard: keys, limits, request ids, errors. Raises ``Unavailable``
    without FastAPI.
    """
    require("fastapi", "the server", extra="serve")
    require("python_multipart", "the server", extra="serve")
    from fastapi import FastAPI

    app = FastAPI(title="tstitch-trt", root_path=settings.root_path, docs_url=None, redoc_url=None)
    for router in extra_routes:
        app.include_router(router)
    return app
