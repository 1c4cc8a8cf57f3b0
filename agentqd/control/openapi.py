"""The OpenAPI description, worked out of the route table."""

from __future__ import annotations

import re
from typing import Any, Final

from aiohttp import web

from agentqd.control.route import JSON, Call, Param, Route, answer

_PART: Final = re.compile(r"\{(\w+)\}")
_ERROR: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["error", "message"],
    "properties": {"error": {"type": "string"}, "message": {"type": "string"}},
}
_COMMON: Final = {
    400: "invalid_request",
    403: "not_permitted",
    413: "too_large",
    500: "internal_error",
    503: "journal_failed: the outcome is unknown; ask again with the same id",
}


def describe(routes: tuple[Route, ...], version: str) -> dict[str, Any]:
    """The whole document."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "agentqd control socket",
            "version": version,
            "summary": "HTTP over a Unix socket; see docs/api.md.",
        },
        "servers": [{"url": "http://box", "description": "agentqd.sock in the runtime folder"}],
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }


def _operation(route: Route) -> dict[str, Any]:
    parts = _PART.findall(route.path)
    words = [
        route.method.lower(),
        *(word for word in re.split(r"[^A-Za-z0-9]+", route.path) if word not in ("", "v1")),
    ]
    parameters = [
        {"name": part, "in": "path", "required": True, "schema": {"type": "string"}} for part in parts
    ]
    parameters += [_parameter(param, "query") for param in route.query]
    parameters += [_parameter(param, "header") for param in route.headers]
    operation: dict[str, Any] = {
        "operationId": "_".join(words),
        "summary": route.summary,
        "parameters": parameters,
        "responses": {
            str(status): _response(status, text, route.answer) for status, text in _statuses(route).items()
        },
    }
    operation["responses"][str(route.status)] = {"description": "done", "content": _content(route.answer, {})}
    if route.body is not None:
        operation["requestBody"] = {
            "required": "required" in route.body,
            "content": {JSON: {"schema": dict(route.body)}},
        }
    return operation


def _statuses(route: Route) -> dict[int, str]:
    statuses = dict(_COMMON)
    for status, text in route.more_statuses.items():
        statuses[status] = f"{text}; {statuses[status]}" if status in statuses else text
    return dict(sorted(statuses.items()))


def _response(status: int, text: str, good: str) -> dict[str, Any]:
    if status < 400:
        return {"description": text, "content": _content(good, {})}
    return {"description": text, "content": _content(JSON, {"$ref": "#/components/schemas/Error"})}


def _content(type_: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {type_: {"schema": schema} if schema else {}}


def _parameter(param: Param, place: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": param.kind}
    if param.one_of:
        schema["enum"] = list(param.one_of)
    bounds = {"minimum": param.least, "maximum": param.most, "default": param.default}
    schema |= {name: value for name, value in bounds.items() if value is not None}
    return {"name": param.name, "in": place, "required": False, "description": param.text, "schema": schema}


async def show_description(call: Call) -> web.StreamResponse:
    return answer(describe(call.room.routes, call.room.parts.version))


ROUTES: Final = (Route("GET", "/v1/openapi.json", "This description.", show_description),)
