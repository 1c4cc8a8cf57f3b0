"""The control socket's server: one aiohttp application over one route table.

Promises:
1. Every request's peer is checked against what the kernel recorded when it connected; others get 403 and nothing else.
2. Every answer but a log's bytes, the event stream and the metrics is JSON, errors too (docs/api.md).
3. A failed journal is 503: the outcome is unknown, the same id may be sent again.
4. A removed socket file comes back within a second; connections that are open stay open.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Middleware

from agentqd.control.access import always_allowed, member
from agentqd.control.contact import HEADER, read_contact
from agentqd.control.room import Parts, Room
from agentqd.control.route import Call, Handler, Route, answer, error_answer, read_query
from agentqd.control.socketfile import (
    Mode,
    SocketFile,
    apply_mode,
    is_ours,
    make_socket,
    mode_for,
    remove_ours,
)
from agentqd.control.table import ROUTES
from agentqd.core.errors import AgentqError, JournalError, NotPermitted, StateFolderError
from agentqd.core.limits import CONTROL_BODY_BYTES_MAX
from agentqd.loops.box import Box, Log
from agentqd.system.peercred import peer_of

__all__ = ["ControlServer", "Parts"]

_LOOK_EVERY_S: Final = 1.0
_SHUTDOWN_S: Final = 2.0
_KEEPALIVE_S: Final = 30.0
_CODES: Final = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
_Aiohttp = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ControlServer:
    """Between `start` and `close` the socket answers; `run` is its loop."""

    def __init__(self, box: Box, parts: Parts) -> None:
        self._box = box
        self._path = box.folders.control_socket
        self._room = Room(box, parts, ROUTES)
        self._runner = web.AppRunner(
            make_app(self._room),
            handle_signals=False,
            access_log=None,
            logger=_aiohttp_log(box),
            handler_cancellation=True,  # a long poll whose asker has gone is not kept
            shutdown_timeout=_SHUTDOWN_S,
            keepalive_timeout=_KEEPALIVE_S,
        )
        self._site: web.SockSite | None = None
        self._file: SocketFile | None = None
        self._mode = Mode(0o600, None)
        self._told = ""

    async def start(self) -> None:
        """Serve. Raises StateFolderError: another daemon serves this path, or the file cannot be made."""
        await self._runner.setup()
        await self._serve()
        self._box.beat("control")

    async def close(self) -> None:
        """Take nothing new, let long polls answer now, cut off what is left after two seconds."""
        self._room.closing.set()
        if self._file is not None:
            remove_ours(self._path, self._file.identity)
        await self._runner.cleanup()
        self._room.watch.close()

    async def run(self) -> None:
        """Until cancelled: the file stays in place, with the mode that the newest config says."""
        while True:
            self._box.beat("control")
            try:
                await self._look()
            except (OSError, StateFolderError) as error:
                self._tell("control_socket_failed", str(error))
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _serve(self) -> None:
        self._mode = mode_for(self._box.settings.control)
        made = make_socket(self._path, self._mode)
        site = web.SockSite(self._runner, made.listener, backlog=512)
        await site.start()
        before, self._site = self._site, site
        self._file = made
        if before is not None:
            await before.stop()

    async def _look(self) -> None:
        assert self._file is not None, "run comes after start"
        ours = is_ours(self._path, self._file.identity)
        if ours is None:
            await self._serve()
            self._box.log.warning("control_socket_remade", path=self._path)
        elif not ours:
            self._tell("control_socket_taken", f"{self._path} is another program's socket now")
        elif (wanted := mode_for(self._box.settings.control)) != self._mode:
            apply_mode(self._path, wanted)
            self._mode = wanted

    def _tell(self, event: str, text: str) -> None:
        """Once for each trouble, not once a second."""
        if text != self._told:
            self._told = text
            self._box.log.error(event, error=text)


def make_app(room: Room) -> web.Application:
    """The application over the route table."""
    app = web.Application(client_max_size=CONTROL_BODY_BYTES_MAX, middlewares=[_guard(room)])
    for route in room.routes:
        app.router.add_route(route.method, route.path, _entry(room, route))
    return app


def _entry(room: Room, route: Route) -> _Aiohttp:
    handler: Handler = route.handler

    async def entry(request: web.Request) -> web.StreamResponse:
        return await handler(Call(room, request, read_query(route, request)))

    return entry


def _guard(room: Room) -> Middleware:
    """The one place where errors become answers."""

    @web.middleware
    async def guard(request: web.Request, handler: _Aiohttp) -> web.StreamResponse:
        try:
            room.box.stir()
            await _check_peer(room, request)
            if HEADER in request.headers and (names := read_contact(request.headers[HEADER])):
                room.parts.delivery.hears_of(names)
            return await handler(request)
        except NotPermitted as error:
            refused = error_answer(error)
            refused.force_close()
            return refused
        except JournalError as error:
            text = f"the journal failed, the outcome is unknown; ask again with the same id: {error.message}"
            return answer({"error": error.code, "message": text}, 503)
        except AgentqError as error:
            return error_answer(error)
        except web.HTTPException as error:
            return _http_error(request, error)
        except (ConnectionError, asyncio.CancelledError):
            raise  # whoever asked has gone
        except Exception as error:  # noqa: BLE001 - a bug in one route must not take the others along
            return _internal(room.box.log, request, error)

    return guard


async def _check_peer(room: Room, request: web.Request) -> None:
    transport = request.transport
    sock = None if transport is None else transport.get_extra_info("socket")
    if sock is None:
        raise ConnectionResetError("the peer has gone")
    peer = peer_of(sock)
    if always_allowed(peer):
        return
    group = room.box.settings.control.group
    if group is not None and await asyncio.to_thread(member, peer, group):
        return
    room.box.log.warning("control_refused", uid=peer.uid, pid=peer.pid)
    who = "its user, root" + (f" and the group {group}" if group else "")
    raise NotPermitted(f"uid {peer.uid} may not use this agentqd; {who} may", uid=peer.uid)


def _http_error(request: web.Request, error: web.HTTPException) -> web.Response:
    """aiohttp's own refusals (no such path, wrong method, a body too large), as JSON."""
    messages = {
        404: f"there is nothing at {request.method} {request.path[:200]}; see GET /v1/openapi.json",
        405: f"{request.path[:200]} does not take {request.method}",
        413: f"the body is larger than {CONTROL_BODY_BYTES_MAX} bytes",
    }
    code = _CODES.get(error.status, "invalid_request")
    made = answer({"error": code, "message": messages.get(error.status, error.reason)}, error.status)
    if "Allow" in error.headers:
        made.headers["Allow"] = error.headers["Allow"]
    return made


def _internal(log: Log, request: web.Request, error: Exception) -> web.Response:
    """A bug: told in full in the log, never in the answer (its text may hold a prompt)."""
    route = request.match_info.route.resource
    path = route.canonical if route is not None else "?"
    log.error(
        "control_failed",
        method=request.method,
        path=path,
        error=type(error).__name__,
        traceback=traceback.format_exc(),
    )
    text = f"agentqd failed in {request.method} {path} ({type(error).__name__}); its log has the traceback"
    return answer({"error": "internal_error", "message": text}, 500)


class _Forward(logging.Handler):
    """aiohttp's own complaints (malformed requests, a failed stream) go where the daemon's go."""

    def __init__(self, box: Box) -> None:
        super().__init__()
        self._box = box

    def emit(self, record: logging.LogRecord) -> None:
        trace = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else None
        with contextlib.suppress(ValueError, TypeError):  # a message that does not fit its arguments
            self._box.log.warning("control_http", message=record.getMessage(), traceback=trace)


def _aiohttp_log(box: Box) -> logging.Logger:
    logger = logging.getLogger("agentqd.control.http")
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    logger.handlers[:] = [_Forward(box)]
    return logger
