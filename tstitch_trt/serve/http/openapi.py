"""The OpenAPI document of the server, with the operator's limits in it, and a page of it without outside assets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import jinja2
import msgspec

from tstitch_trt.serve.http import messages
from tstitch_trt.serve.http.limits import HttpLimits, HttpSettings

__all__ = ["OPERATIONS", "describe", "page"]

OPERATIONS: Final = (
    ("/v1/images/generations", "POST", "generate"),
    ("/v1/images/edits", "POST", "edit"),
    ("/v1/models", "GET", "models"),
    ("/v1/models/{model}", "GET", "model"),
    ("/healthz", "GET", "health"),
    ("/readyz", "GET", "ready"),
    ("/admin/reload", "POST", "reload"),
    ("/openapi.json", "GET", "description"),
    ("/docs", "GET", "docs"),
)
"""Path, method, and the name of what answers it."""

_ABOUT: Final = """\
OpenAI's images API over T-Stitch bundles. Their clients work unchanged; parameters of ours stand beside theirs.

A parameter of OpenAI's that would change the picture is honoured or refused, never ignored. Without `seed` every \
image has a random one, which the answer tells. What was resolved (model, schedule, steps, solver, seeds, and what was \
made cheaper under load) is in `tstitch` of the answer, and in the headers x-tstitch-* of an answer that is a picture.

`stream: true` gives server-sent events under OpenAI's names. `Accept: image/png`, `image/jpeg` or `image/webp` gives \
the picture itself, for one image. Every answer bears `x-request-id`: the request's own, or a new one.
"""

_STRUCTS: Final = (
    messages.GenerationRequest, messages.EditRequest, messages.EditForm, messages.ImagesResponse,
    messages.PartialImageEvent, messages.CompletedEvent, messages.ModelList, messages.ModelDetail, messages.Health,
    messages.Reloaded, messages.ErrorBody,
)  # fmt: skip
_RETRY: Final = {"Retry-After": {"description": "Seconds.", "schema": {"type": "string"}}}
_ERRORS: Final[Mapping[int, str]] = {
    400: "The request can't be right; the message says what is allowed.",
    401: "The key is missing or wrong.",
    403: "Not for this caller: a page of another site, or an admin route from elsewhere.",
    404: "No such model.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is of another type.",
    421: "The server is not reached under this name.",
    429: "The queue is full, the latency budget can't be met now, or a reload is running. Try again after Retry-After.",
    500: "An error of the server. The message has the request's id; the server's log has the rest.",
    503: "The server is starting, ending or has failed. Try again after Retry-After.",
    504: "The request took longer than the server allows.",
}
_ALWAYS: Final = (401, 403, 421, 500)
_OPEN: Final = (403, 421, 500)
_DRAWING: Final = (400, *_ALWAYS, 404, 408, 413, 415, 429, 503, 504)


def describe(settings: HttpSettings) -> dict[str, Any]:
    """The document. Deterministic."""
    _, schemas = msgspec.json.schema_components(_STRUCTS, ref_template="#/components/schemas/{name}")
    for name in ("GenerationRequest", "EditRequest", "EditForm"):
        _limit(schemas[name], settings.limits)
    form = schemas["EditForm"]
    file = {"type": "string", "format": "binary"}
    form["properties"] |= {
        "image": {**file, "description": "The picture: PNG, JPEG or WebP."},
        "mask": {**file, "description": "PNG or WebP of the same size; where it is transparent is painted anew."},
    }
    form["required"] = ["image"]
    drawn = _drawn_answer()
    edit = {"multipart/form-data": "EditForm", "application/json": "EditRequest"}
    unable = {"503": _json_answer("It can't: restart it.", "Health")}
    operations = {
        "generate": _operation("Draw images.", drawn, _DRAWING, body={"application/json": "GenerationRequest"}),
        "edit": _operation("Draw a picture anew, or what a mask leaves open of it.", drawn, _DRAWING, body=edit),
        "models": _operation("The models.", _answer("ModelList"), _ALWAYS),
        "model": _operation("A model, and what it can do.", _answer("ModelDetail"), (*_ALWAYS, 404)),
        "health": _operation("Whether it can still draw.", {**_answer("Health"), **unable}, _OPEN),
        "ready": _operation("Whether it takes requests now.", _answer("Health"), (*_OPEN, 503)),
        "reload": _operation(
            "Load changed bundles, which take over between requests.",
            _answer("Reloaded"),
            (400, *_ALWAYS, 404, 429, 503),
        ),
    }
    operations["model"]["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    paths = {path: {method.lower(): {"operationId": name, **operations[name]}}
             for path, method, name in OPERATIONS if name in operations}  # fmt: skip
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "tstitch-trt", "version": "1", "description": _ABOUT},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if settings.root_path:
        document["servers"] = [{"url": settings.root_path}]
    if settings.keys is not None:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in paths.items():
            for operation in methods.values():
                operation["security"] = [] if path in settings.open_paths else [{"key": []}]
    return document


def _limit(schema: dict[str, Any], limits: HttpLimits) -> None:
    """Puts the operator's limits into the schema of a request."""
    most = {
        "prompt": {"maxLength": limits.prompt}, "negative_prompt": {"maxLength": limits.prompt},
        "n": {"maximum": limits.images}, "steps": {"maximum": limits.steps}, "guidance": {"maximum": limits.guidance},
        "priority": {"minimum": -limits.priority, "maximum": limits.priority},
        "latency_budget_ms": {"maximum": limits.latency_budget_ms}, "seed": {"maximum": 2**64 - 1},
    }  # fmt: skip
    for name, bounds in most.items():
        for kind in schema["properties"][name]["anyOf"]:
            if kind["type"] != "null":
                kind |= bounds


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json_answer(description: str, name: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _reference(name)}}}


def _answer(name: str) -> dict[str, Any]:
    return {"200": _json_answer("It is so.", name)}


def _drawn_answer() -> dict[str, Any]:
    picture = {"schema": {"type": "string", "format": "binary"}}
    names = [f"{kind}.{what}" for kind in ("image_generation", "image_edit") for what in ("partial_image", "completed")]
    data = {"anyOf": [_reference(name) for name in ("PartialImageEvent", "CompletedEvent", "ErrorBody")]}
    events = {
        "type": "object",
        "properties": {
            "event": {"enum": [*names, "error"]},
            "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": data},
        },
    }
    content = {
        "application/json": {"schema": _reference("ImagesResponse")},
        "text/event-stream": {"schema": events},
        **{f"image/{form}": picture for form in messages.FORMATS},
    }
    return {"200": {"description": "The images.", "content": content}}


def _operation(
    summary: str, answers: dict[str, Any], errors: tuple[int, ...], body: Mapping[str, str] | None = None
) -> dict[str, Any]:
    responses = dict(answers)
    for status in sorted(set(errors)):
        answer = _json_answer(_ERRORS[status], "ErrorBody")
        responses[str(status)] = {**answer, "headers": _RETRY} if status in (429, 503) else answer
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if body is not None:
        content = {kind: {"schema": _reference(schema)} for kind, schema in body.items()}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


_PAGE: Final = """\
<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ info.title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
h2 { border-top: 1px solid #ccc; padding-top: 1em } code { background: #f3f3f3 }
table { border-collapse: collapse; width: 100% } td { border-bottom: 1px solid #eee; padding: .2em .6em .2em 0;
vertical-align: top } td:first-child { white-space: nowrap; font-family: monospace }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } code { background: #2a2a2a }
td { border-color: #333 } }
</style>
<h1>{{ info.title }}</h1>
{% for part in info.description.split("\\n\\n") %}<p>{{ part }}</p>{% endfor %}
<p>The whole of it for programs: <code>/openapi.json</code></p>
{% for path, operations in paths.items() %}{% for method, operation in operations.items() %}
<h2><code>{{ method.upper() }} {{ path }}</code></h2><p>{{ operation.summary }}</p>
{% for kind, content in operation.get("requestBody", {}).get("content", {}).items() %}
<h3>Body: {{ kind }}</h3>{{ fields(content.schema) }}{% endfor %}
<h3>Answers</h3><table>{% for status, answer in operation.responses.items() %}
<tr><td>{{ status }}</td><td>{{ answer.description }}{% for kind, content in answer.get("content", {}).items() %}
<br><code>{{ kind }}</code> {{ name(content.schema) }}{% endfor %}</td></tr>{% endfor %}</table>
{% endfor %}{% endfor %}
<h2>Messages</h2>{% for title, schema in components.schemas.items() %}
<h3 id="{{ title }}">{{ title }}</h3><p>{{ schema.description }}</p>{{ table(schema) }}{% endfor %}
"""
_MACROS: Final = """\
{% macro name(schema) %}{% if "$ref" in schema %}<a href="#{{ schema["$ref"].rsplit("/")[-1] }}">\
{{ schema["$ref"].rsplit("/")[-1] }}</a>{% endif %}{% endmacro %}
{% macro kind(schema) %}{% if schema.anyOf %}{% for each in schema.anyOf if each.type != "null" %}\
{{ kind(each) }}{{ " or " if not loop.last }}{% endfor %}{% elif "$ref" in schema %}{{ name(schema) }}\
{% elif schema.enum %}{{ schema.enum | join(", ") }}{% elif schema.type == "array" %}list of \
{{ kind(schema["items"]) }}\
{% else %}{{ schema.type }}{% if schema.minimum is defined and schema.maximum is defined %} \
{{ schema.minimum }} to {{ schema.maximum }}{% endif %}{% if schema.maxLength %} of at most {{ schema.maxLength }} \
characters{% endif %}{% endif %}{% if schema.description %}. {{ schema.description }}{% endif %}{% endmacro %}
{% macro table(schema) %}<table>{% for field, of in (schema.properties or {}).items() %}\
<tr><td>{{ field }}</td><td>{{ kind(of) }}</td></tr>{% endfor %}</table>{% endmacro %}
{% macro fields(schema) %}<p>{{ name(schema) }}</p>{% endmacro %}
"""


def page(document: Mapping[str, Any]) -> str:
    """The document as HTML that loads nothing."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.ChainableUndefined)
    return environment.from_string(_MACROS + _PAGE).render(document)
