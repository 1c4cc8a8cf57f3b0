"""The socket: who may connect, who is the daemon now, and what it is told.

Invariants:
1. One daemon at a time: the one with the highest epoch ever seen (in this instance's life).
2. A newer Hello closes the older connection first; its lines that were not acted on are never acted on.
3. Nothing that a connection sends, and no lack of descriptors, ends the loop or touches a worker.
4. Nothing is started whose end has arrived with the order to start it.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
from collections.abc import Callable
from typing import Final

import msgspec

from agentqd.core.limits import WIRE_MESSAGE_BYTES_MAX
from agentqd.supervisor import limits
from agentqd.supervisor.connection import Connection, LineTooLongError
from agentqd.supervisor.context import Context
from agentqd.supervisor.lookahead import end_ahead, starts_something
from agentqd.supervisor.wire import (
    PROTOCOL,
    Go,
    Hello,
    Refuse,
    Report,
    Request,
    Run,
    Welcome,
    decode_request,
    encode,
)
from agentqd.system.peercred import peer_of

_NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Server:
    """`act` gets every request but Hello; `cut_off` is called when the current daemon's connection is gone."""

    def __init__(
        self,
        context: Context,
        listener: socket.socket,
        welcome: Callable[[], Welcome],
        act: Callable[[Request, float], None],
        cut_off: Callable[[], None],
    ) -> None:
        self._context = context
        self._listener = listener
        self._welcome = welcome
        self._act = act
        self._cut_off = cut_off
        self._daemon: Connection | None = None
        self._connections: set[Connection] = set()
        self._backlog: set[Connection] = set()
        self._epoch_seen = -1
        self._listens = False
        listener.setblocking(False)
        self._listen()

    @property
    def has_daemon(self) -> bool:
        return self._daemon is not None

    @property
    def has_pending(self) -> bool:
        """Reports wait to be sent."""
        return self._daemon is not None and self._daemon.pending_bytes > 0

    @property
    def has_backlog(self) -> bool:
        """Whole lines wait: the loop must not sleep."""
        return bool(self._backlog)

    def tell(self, report: Report) -> None:
        """Queue a report for the daemon, if one is connected."""
        daemon = self._daemon
        if daemon is not None and not daemon.queue(encode(report), whatever_size=isinstance(report, Welcome)):
            self._context.log("warning", "daemon_does_not_read", pending_bytes=daemon.pending_bytes)
            self._close(daemon)

    def work_backlog(self) -> None:
        """A turn for every connection that has whole lines waiting."""
        for connection in list(self._backlog):
            self._act_on_lines(connection)

    def flush(self) -> None:
        """Send what waits for the daemon; once in a turn of the loop."""
        daemon = self._daemon
        if daemon is None or not daemon.pending_bytes:
            return
        daemon.flush()
        if daemon.ended:
            self._close(daemon)
        else:
            self._watch(daemon)

    def _listen(self) -> None:
        self._context.selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._listens = True

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as problem:
            if problem.errno in _NO_ROOM:
                self._context.log("error", "accept_failed", error=str(problem))
                self._context.selector.unregister(self._listener)
                self._listens = False
                self._context.after(limits.ACCEPT_PAUSE_S, self._listen)
            return
        connection = Connection(sock)
        try:
            uid = peer_of(sock).uid
            self._context.selector.register(sock, connection.wants, lambda: self._ready(connection))
        except OSError:
            connection.close()
            return
        self._connections.add(connection)
        if uid not in (0, os.geteuid()):
            self._refuse(connection, "not_permitted", f"user {uid} may not give orders to this supervisor")
        elif len(self._connections) > limits.CONNECTIONS_MAX:
            self._refuse(connection, "not_permitted", "too many connections")
        else:
            self._context.after(limits.HELLO_WITHIN_S, lambda: self._hello_is_late(connection))

    def _hello_is_late(self, connection: Connection) -> None:
        if connection.epoch is None and not connection.closed:
            self._refuse(connection, "protocol", f"no hello within {limits.HELLO_WITHIN_S:g} s")

    def _ready(self, connection: Connection) -> None:
        if connection.closed:
            return  # earlier in this turn
        if connection.pending_bytes:
            connection.flush()
        if connection not in self._backlog:
            connection.receive()
            self._act_on_lines(connection)
        if connection.ended and not connection.closed and connection not in self._backlog:
            self._close(connection)
        elif not connection.closed:
            self._watch(connection)

    def _watch(self, connection: Connection) -> None:
        """Have the selector wait for what this connection waits for."""
        key = self._context.selector.get_key(connection.sock)
        if key.events != connection.wants:
            self._context.selector.modify(connection.sock, connection.wants, key.data)

    def _act_on_lines(self, connection: Connection) -> None:
        self._backlog.discard(connection)
        try:
            for _ in range(limits.REQUESTS_A_TURN_MAX):
                line = connection.take_line()
                if line is None:
                    return
                self._take(connection, decode_request(line))
                if connection.closed:
                    return
            if connection.has_line():
                self._backlog.add(connection)
        except LineTooLongError:
            self._refuse(connection, "protocol", "line too long")
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeError, RecursionError) as problem:
            self._refuse(connection, "protocol", f"not a request: {str(problem)[:200]}")

    def _take(self, connection: Connection, request: Request) -> None:
        if isinstance(request, Hello):
            self._hello(connection, request)
        elif connection.epoch is None:
            self._refuse(connection, "protocol", "the first message must be hello")
        elif not starts_something(request):
            self._act(request, self._context.clock.monotonic_s())
        else:
            self._start(connection, request)

    def _start(self, connection: Connection, request: Go | Run) -> None:
        """Unless that order counts no more: its daemon has been superseded, or has taken it back."""
        if self._listens:
            self._accept()
        for newcomer in [each for each in self._connections if each.epoch is None]:
            self._ready(newcomer)
        if connection.closed:
            return
        now_s = self._context.clock.monotonic_s()
        end = end_ahead(request, connection.ahead())
        if end is None:
            self._act(request, now_s)
            return
        if isinstance(request, Run):  # what is held and ended was never started, and that is answered
            self._act(msgspec.structs.replace(request, hold=True), now_s)
        self._act(end, now_s)

    def _hello(self, connection: Connection, hello: Hello) -> None:
        if hello.protocol != PROTOCOL:
            self._refuse(connection, "protocol", f"this supervisor speaks protocol {PROTOCOL}")
        elif hello.state_id != self._context.state_id:
            self._refuse(
                connection, "other_state_folder", f"this supervisor serves {self._context.state_folder}"
            )
        elif connection.epoch is not None:
            self._refuse(connection, "protocol", "a second hello")
        elif hello.epoch <= self._epoch_seen:
            message = f"epoch {hello.epoch} is not newer than {self._epoch_seen}, seen before"
            self._refuse(connection, "old_epoch", message)
        else:
            if self._daemon is not None:
                self._context.log("info", "daemon_superseded", epoch=hello.epoch)
                self._close(self._daemon)
            self._epoch_seen = connection.epoch = hello.epoch
            connection.line_bytes_max = WIRE_MESSAGE_BYTES_MAX
            self._daemon = connection
            self._context.log("info", "daemon_connected", epoch=hello.epoch, pid=hello.pid)
            self.tell(self._welcome())

    def _refuse(self, connection: Connection, code: str, message: str) -> None:
        self._context.log("warning", "connection_refused", code=code, message=message)
        connection.queue(encode(Refuse(code, message)), whatever_size=True)
        connection.flush()
        self._close(connection)

    def _close(self, connection: Connection) -> None:
        if connection.closed:
            return
        self._connections.discard(connection)
        self._backlog.discard(connection)
        self._context.selector.unregister(connection.sock)
        connection.close()
        if connection is self._daemon:
            self._daemon = None
            self._context.log("info", "daemon_disconnected")
            self._cut_off()
