"""The application: routes over an engine."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import quote

import msgspec
import numpy as np
from numpy.typing import NDArray

from tstitch_engines.bundle.manifest import ComponentName, Manifest
from tstitch_engines.checks import check_type, checked, taken_as_is
from tstitch_engines.errors import BadInput, FailedWork
from tstitch_engines.needs import require
from tstitch_trt.request.options import SampleOptions
from tstitch_trt.serve.http.bodies import read_edit, read_generation
from tstitch_trt.serve.http.errors import ApiError, error_answer, to_api_error
from tstitch_trt.serve.http.guard import Guard, release_body
from tstitch_trt.serve.http.limits import HttpSettings
from tstitch_trt.serve.http.messages import (
    CompletedEvent,
    Drawn,
    Health,
    Image,
    ImagesRequest,
    ImagesResponse,
    Milliseconds,
    Model,
    ModelDetail,
    ModelList,
    PartialImageEvent,
    Reloaded,
)
from tstitch_trt.serve.http.openapi import OPERATIONS, describe, page
from tstitch_trt.serve.http.options import (
    Output,
    Pictures,
    check_limits,
    choose_model,
    output_of,
    sample_options,
)
from tstitch_trt.serve.http.pictures import encode_picture
from tstitch_trt.serve.http.stream import event_bytes, events_response, while_connected

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

    from tstitch_trt.runtime.result import Result
    from tstitch_trt.serve.engine import Engine
    from tstitch_trt.serve.handle import Handle, LaneEvent

__all__ = ["create_app"]

_PLAIN: Final = " :,[]()+=.->/"  # of a header's value; the rest is percent-encoded
Kind = Literal["image_generation", "image_edit"]

_EXPOSED: Final = ("x-request-id", "retry-after", "x-tstitch-model", "x-tstitch-seed", "x-tstitch-steps",
                   "x-tstitch-solver", "x-tstitch-schedule", "x-tstitch-adapted")  # fmt: skip


@checked(engine=taken_as_is, settings=partial(check_type, kind=HttpSettings), extra_routes=taken_as_is)
def create_app(engine: Engine, settings: HttpSettings, *, extra_routes: Sequence[APIRouter] = ()) -> FastAPI:
    """The server of ``engine``, which stays the caller's to warm up, drain and close.

    ``extra_routes``: further routes, under the same guard: keys, limits, request ids, errors. Raises ``Unavailable``
    without FastAPI.
    """
    fastapi = require("fastapi", "the server", extra="serve")
    require("python_multipart", "the server", extra="serve")
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware

    app: FastAPI = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    server = _Server(engine, settings)
    for path, method, name in OPERATIONS:
        app.add_route(path, getattr(server, name), methods=[method], include_in_schema=False)
    for router in extra_routes:
        app.include_router(router)
    app.add_exception_handler(HTTPException, server.refused)
    for kind in (ApiError, BadInput, FailedWork):
        app.add_exception_handler(kind, server.failed)
    app.add_middleware(Guard, settings=settings)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"],
                           allow_headers=["*"], expose_headers=_EXPOSED)  # fmt: skip
    return app


class _Server:
    """The routes, by the names of ``OPERATIONS``."""

    def __init__(self, engine: Engine, settings: HttpSettings) -> None:
        self._engine = engine
        self._settings = settings
        self._began = int(time.time())
        self._reloading = asyncio.Lock()
        self._description = msgspec.json.encode(describe(settings))
        self._page = page(describe(settings)).encode()

    # --- drawing

    async def generate(self, request: Request) -> Response:
        self._check_open()
        message = await read_generation(request, self._settings.limits)
        return await self._draw(request, "image_generation", message)

    async def edit(self, request: Request) -> Response:
        self._check_open()
        return await self._draw(request, "image_edit", *await read_edit(request, self._settings.limits))

    async def _draw(
        self, request: Request, kind: Kind, message: ImagesRequest, pictures: Pictures | None = None
    ) -> Response:
        check_limits(message, self._settings.limits)
        output = output_of(message, request.headers.get("accept", ""))
        model = choose_model(message.model, self._engine.models)
        request_id: str = request.state.request_id
        handle = await _uninterrupted(asyncio.to_thread(self._submit, message, pictures, model, output, request_id))
        del message, pictures  # nobody holds what was sent while it is drawn: its room is given to others
        release_body(request.scope)
        if output.stream:
            return events_response(self._events(kind, output, handle, request_id), handle)
        return await while_connected(_answer(output, handle), handle, request.receive)

    def _submit(
        self, message: ImagesRequest, pictures: Pictures | None, model: str, output: Output, request_id: str
    ) -> Handle:
        options: SampleOptions = sample_options(message, pictures, self._engine.runtime(model), self._settings.limits)
        return self._engine.submit(
            options, model=model, previews=output.previews, latency_budget_ms=message.latency_budget_ms,
            priority=message.priority or 0, timeout=self._settings.timeout, request_id=request_id,
        )  # fmt: skip

    async def _events(self, kind: Kind, output: Output, handle: Handle, request_id: str) -> AsyncIterator[bytes]:
        sent = [0] * handle.n
        try:
            async for event in handle:
                if event.preview is not None and sent[event.image] < output.previews:
                    name = f"{kind}.partial_image"
                    partial = await asyncio.to_thread(_partial, name, event, output, sent[event.image])
                    sent[event.image] += 1
                    yield event_bytes(name, partial)
            result = await handle
            name = f"{kind}.completed"
            for index in range(handle.n):
                done = await asyncio.to_thread(_completed, name, index, output, handle, result)
                yield event_bytes(name, done)
        except Exception as error:
            yield b"event: error\ndata: %s\n\n" % error_answer(to_api_error(error, request_id))[2]

    # --- what there is

    async def models(self, request: Request) -> Response:
        return _json(ModelList(data=[Model(id=name, created=self._began) for name in self._engine.models]))

    async def model(self, request: Request) -> Response:
        name = choose_model(request.path_params["model"], self._engine.models)
        runtime = self._engine.runtime(name)
        manifest, classes = runtime.manifest, runtime.manifest.conditioning
        detail = ModelDetail(
            id=name, created=self._began, kind=classes.kind, members=list(manifest.members),
            sizes=runtime.limits.sizes(), steps=manifest.defaults.steps, solver=manifest.defaults.solver,
            schedule=manifest.defaults.schedule, guidance=manifest.defaults.guidance,
            edits=_starts_from_pictures(manifest), class_count=classes.classes, classes=list(classes.names),
        )  # fmt: skip
        return _json(detail)

    async def health(self, request: Request) -> Response:
        failed = self._engine.state().failed
        return _json(Health(status="ok" if failed is None else "failed"), status=200 if failed is None else 503)

    async def ready(self, request: Request) -> Response:
        self._check_open()
        return _json(Health(status="ready"))

    async def description(self, request: Request) -> Response:
        from starlette.responses import Response

        return Response(self._description, media_type="application/json")

    async def docs(self, request: Request) -> Response:
        from starlette.responses import Response

        policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
        return Response(self._page, media_type="text/html", headers=policy)

    async def reload(self, request: Request) -> Response:
        if self._settings.reload is None:
            raise ApiError(404, "this server does not reload its models", code="not_found")
        async with self._reloading:
            return _json(Reloaded(models=list(await asyncio.to_thread(self._settings.reload))))

    def _check_open(self) -> None:
        """Raises ``ApiError`` 503 where nothing can be drawn now."""
        state = self._engine.state()
        problem = "failed" if state.failed is not None else "ending" if state.draining else "starting"
        if not state.ready or state.draining or state.failed is not None:
            raise ApiError(503, f"the server is {problem}\nhint: try again in some seconds", wait=5.0, code=problem)

    # --- errors

    async def failed(self, request: Request, error: Exception) -> Response:
        from starlette.responses import Response

        status, headers, body = error_answer(to_api_error(error, request.state.request_id))
        return Response(body, status, headers)

    async def refused(self, request: Request, error: Exception) -> Response:
        """Of the router: no such route or method; and of the reader of forms."""
        status = getattr(error, "status_code", 500)
        message = f"{HTTPStatus(status).phrase}: {getattr(error, 'detail', '')}"
        if status == 404:
            message = "there is nothing at this address\nhint: see /openapi.json"
        headers = getattr(error, "headers", None) or {}
        if status == 405:
            message = f"the method {request.method[:20]} is not allowed here\nhint: use {headers.get('Allow', 'GET')}"
        return await self.failed(request, ApiError(status, message, headers=headers))


async def _uninterrupted(submitting: Any) -> Handle:
    """What a thread submits, which is cancelled where this task is meanwhile."""
    task: asyncio.Task[Handle] = asyncio.ensure_future(submitting)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(lambda done: done.cancelled() or done.exception() or done.result().cancel())
        raise


def _starts_from_pictures(manifest: Manifest) -> bool:
    return manifest.decoder.kind == "pixel" or ComponentName.VAE_ENCODER in manifest.parts


def _json(data: msgspec.Struct, *, status: int = 200) -> Response:
    from starlette.responses import Response

    return Response(msgspec.json.encode(data), status, media_type="application/json")


def _size_text(pixels: NDArray[np.uint8]) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def _drawn(handle: Handle, result: Result) -> Drawn:
    times = {name: round(1000 * getattr(handle.times, name), 3) for name in Milliseconds.__struct_fields__}
    return Drawn(
        request_id=handle.id, model=handle.model, schedule=str(handle.plan.schedule), steps=handle.plan.steps,
        solver=handle.plan.solver.name, seeds=list(result.seeds), labels=list(result.labels), adapted=handle.adapted,
        milliseconds=Milliseconds(**times),
    )  # fmt: skip


def _images(result: Result) -> NDArray[np.uint8]:
    if result.images is None:
        raise BadInput("this model gives latents, no pictures", hint="serve a bundle with a decoder")
    return result.images


def _base64(pixels: NDArray[np.uint8], output: Output) -> str:
    return base64.b64encode(encode_picture(pixels, output.form, output.quality)).decode()


async def _answer(output: Output, handle: Handle) -> Response:
    result = await handle
    make = _binary if output.binary else _whole
    return await asyncio.to_thread(make, output, handle, result)


def _whole(output: Output, handle: Handle, result: Result) -> Response:
    images = _images(result)
    response = ImagesResponse(
        created=int(time.time()), data=[Image(b64_json=_base64(pixels, output)) for pixels in images],
        output_format=output.form, size=_size_text(images[0]), tstitch=_drawn(handle, result),
        safety_identifier=output.identifier or msgspec.UNSET,
    )  # fmt: skip
    return _json(response)


def _binary(output: Output, handle: Handle, result: Result) -> Response:
    from starlette.responses import Response

    said: dict[str, object] = {
        "model": handle.model, "seed": result.seeds[0], "steps": handle.plan.steps,
        "solver": handle.plan.solver.name, "schedule": handle.plan.schedule,
    }  # fmt: skip
    if handle.adapted is not None:
        said["adapted"] = handle.adapted
    headers = {f"x-tstitch-{name}": quote(str(value), safe=_PLAIN) for name, value in said.items()}
    content = encode_picture(_images(result)[0], output.form, output.quality)
    return Response(content, headers=headers, media_type=f"image/{output.form}")


def _partial(name: str, event: LaneEvent, output: Output, index: int) -> PartialImageEvent:
    if event.preview is None:
        raise ValueError("an event without a preview")
    return PartialImageEvent(
        type=name, b64_json=_base64(event.preview, output), created_at=int(time.time()), output_format=output.form,
        size=_size_text(event.preview), image_index=event.image, partial_image_index=index, step=event.step,
        steps=event.steps, member=event.member,
    )  # fmt: skip


def _completed(name: str, index: int, output: Output, handle: Handle, result: Result) -> CompletedEvent:
    pixels = _images(result)[index]
    return CompletedEvent(
        type=name, b64_json=_base64(pixels, output), created_at=int(time.time()), output_format=output.form,
        size=_size_text(pixels), image_index=index, tstitch=_drawn(handle, result),
        safety_identifier=output.identifier or msgspec.UNSET,
    )  # fmt: skip
