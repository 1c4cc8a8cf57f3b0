"""What a route is: one object that registers it, reads its request and describes it (openapi.py), so that the three cannot drift."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec
from aiohttp import web

from agentqd.control.room import Room
from agentqd.core.doubled import DoubledKey, refuse_doubled_keys
from agentqd.core.errors import EXIT_OTHER, AgentqError, InvalidRequest

Kind = Literal["string", "integer", "number"]
JSON: Final = "application/json"
_encode: Final = msgspec.json.Encoder().encode


class NoSuchAttempt(AgentqError):
    code = "no_such_attempt"
    http_status = 404


class NoSuchQueue(AgentqError):
    code = "no_such_queue"
    exit_code = EXIT_OTHER
    http_status = 404


@dataclass(frozen=True, slots=True)
class Param:
    """One query parameter. A number outside of its bounds is refused, never bent."""

    name: str
    text: str
    kind: Kind = "string"
    default: Any = None
    least: float | None = None
    most: float | None = None
    one_of: tuple[str, ...] = ()

    def read(self, text: str) -> Any:
        """Raises InvalidRequest."""
        if self.kind == "string":
            if not is_text(text):
                raise InvalidRequest(f"{self.name} is not UTF-8", field=self.name)
            if self.one_of and text not in self.one_of:
                raise InvalidRequest(
                    f"{self.name}: {text[:80]!r} is none of {', '.join(self.one_of)}", field=self.name
                )
            return text
        try:
            value: float = int(text) if self.kind == "integer" else float(text)
        except ValueError:
            raise InvalidRequest(f"{self.name}: {text[:80]!r} is no {self.kind}", field=self.name) from None
        low, high = self.least, self.most
        if (
            not math.isfinite(value)
            or (low is not None and value < low)
            or (high is not None and value > high)
        ):
            bounds = f"at least {low:g}" if high is None else f"between {low or 0:g} and {high:g}"
            raise InvalidRequest(f"{self.name}: {text[:80]} is not {bounds}", field=self.name)
        return value


@dataclass(frozen=True, slots=True)
class Call:
    """One request, its query read and checked. `query` has every parameter of the route (its default if not given)."""

    room: Room
    request: web.Request
    query: Mapping[str, Any]

    def part(self, name: str) -> str:
        """A part of the path."""
        return self.request.match_info[name]

    async def body(self) -> dict[str, Any]:
        """The body as an object; empty counts as `{}`. Raises InvalidRequest."""
        raw = await self.request.read()
        if not raw.strip():
            return {}
        try:
            value = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequest(f"the body is not JSON: {error}"[:300]) from None
        if not isinstance(value, dict):
            raise InvalidRequest("the body is one JSON object")
        try:
            refuse_doubled_keys(raw)
        except DoubledKey as error:
            raise InvalidRequest(str(error), field=error.name) from None
        return value


Handler = Callable[[Call], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    method: Literal["GET", "POST"]
    path: str
    summary: str
    handler: Handler
    query: tuple[Param, ...] = ()
    headers: tuple[Param, ...] = ()  # described only; the handler reads them
    body: Mapping[str, Any] | None = None  # JSON schema of the request's body
    status: int = 200
    answer: str = JSON
    more_statuses: Mapping[int, str] = field(default_factory=dict)


def read_query(route: Route, request: web.Request) -> dict[str, Any]:
    """Raises InvalidRequest: an unknown or doubled parameter is never ignored."""
    known = {param.name: param for param in route.query}
    values = {param.name: param.default for param in route.query}
    given = request.query
    for name, text in given.items():
        if name not in known:
            there_is = ", ".join(known) or "none"
            raise InvalidRequest(f"unknown parameter {name[:80]!r}; there is: {there_is}", field=name[:80])
        if len(given.getall(name)) > 1:
            raise InvalidRequest(f"{name} is given more than once", field=name)
        if text != "":
            values[name] = known[name].read(text)
    return values


def known_fields(body: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raises InvalidRequest for a member that the body may not have."""
    for name in body:
        if name not in names:
            raise InvalidRequest(
                f"unknown field {name[:80]!r}; there is: {', '.join(names) or 'none'}", field=name[:80]
            )


def answer(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=_encode(value), status=status, content_type=JSON)


def answer_raw(body: bytes) -> web.Response:
    """JSON that was put together from stored bytes."""
    return web.Response(body=body, content_type=JSON)


def error_answer(error: AgentqError, status: int | None = None) -> web.Response:
    return answer(error.as_json(), status or error.http_status)


def is_text(text: str) -> bool:
    """Can it be written down at all? (A path that was no UTF-8 comes with lone surrogates.)"""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\x00" not in text


def comma_list(text: str | None, known: tuple[str, ...], name: str) -> tuple[str, ...]:
    """`a,b` as its items, each one of `known` (empty: anything). Raises InvalidRequest."""
    items = tuple(dict.fromkeys(item for item in (text or "").split(",") if item))
    for item in items:
        if known and item not in known:
            raise InvalidRequest(f"{name}: {item[:80]!r} is none of {', '.join(known)}", field=name)
    return items
