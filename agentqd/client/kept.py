"""A box over SSH as a verb sees it: requests to the keeper's socket, the keeper started when it is not there.

Promises:
1. No SSH library, no asyncio, no yaml is loaded here: a verb through a living keeper costs a socket more than on the box.
2. `control` and `about` are asked again when a keeper goes away before it has answered: nothing was sent through it.
   The lines of an append and the bytes of a payload are sent once only, after the keeper has said that it is ready.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import agentqd
from agentqd.client.channel import Channel, SocketChannel
from agentqd.client.errors import AnswerLost, BoxUnreachable, HostKeyRefused, NoSuchBox
from agentqd.client.keeperplace import Place, config_file, config_stamp, find_place
from agentqd.core.errors import (
    AgentqError,
    ConfigError,
    NotPermitted,
    RefusedForNow,
    StateFolderError,
    Unreachable,
)

STARTS_MAX = 4  # another keeper may leave or fall over just as we come
START_WAIT_S = 10.0
START_RETRY_S = 0.01
ANSWER_TIMEOUT_S = 300.0  # login with a passphrase typed by a person; a dead network ends much earlier
ANSWER_BYTES_MAX = 64 * 1024
CONNECT_TIMEOUT_S = 5.0
WORD_BYTES_MAX = 64

Answer = dict[str, Any]
Note = Callable[[str], None]


class Kept:
    """The keeper of one box. `note` gets what a person should know once (a relay is used)."""

    def __init__(self, box: str, env: Mapping[str, str], uid: int, note: Note = lambda _text: None) -> None:
        self.box = box
        self._env = env
        self._config = config_file(env)
        self._place = find_place(box, env, uid)
        self._note = note

    @property
    def name(self) -> str:
        return f"box {self.box}"

    def open(self) -> Channel:
        """A channel to the box's control socket (this is a `Transport`)."""
        sock, _ = self._ask({"op": "control"})
        return SocketChannel(sock)

    def about(self) -> Answer:
        """Server, user, folders of the box. Raises AgentqError."""
        sock, answer = self._ask({"op": "about"})
        sock.close()
        return answer

    def append(self, body: bytes) -> str:
        """Whole lines in one packet; the path on the box. Raises AgentqError, AnswerLost where the outcome is unknown."""
        return str(self._send({"op": "append", "bytes": len(body)}, body)["queue_file"])

    def put(self, name: str, data: bytes) -> str:
        """A payload as prompts/NAME; what `prompt_ref` says."""
        return str(self._send({"op": "put", "name": name, "bytes": len(data)}, data)["prompt_ref"])

    def leave(self) -> bool:
        """Ends the keeper, if there is one; says whether there was."""
        try:
            sock = _connect(self._place.socket)
        except OSError:
            return False
        with sock, suppress(OSError):
            sock.sendall(b'{"op":"leave"}\n')
            _read_line(sock)
        return True

    def warm(self) -> None:
        """Starts a keeper early where there is none, and waits for nothing."""
        if not os.path.exists(self._place.socket):
            with suppress(OSError):
                _starting.setdefault(self._place.socket, _spawn(self.box, self._config, self._place))

    def _send(self, request: Answer, body: bytes) -> Answer:
        sock, _ = self._ask(request)
        with sock:
            lost = f"{self.name}: what became of it is unknown; say it again with the same --id"
            try:
                with suppress(BrokenPipeError):  # it may have said why before it closed
                    sock.sendall(body)
                line = _read_line(sock)
            except TimeoutError:
                raise AnswerLost(f"{lost} (no answer)", box=self.box) from None
            except OSError:
                line = b""
            if not line:
                raise AnswerLost(f"{lost} (the connection broke)", box=self.box)
            return self._checked(line)

    def _ask(self, request: Answer) -> tuple[socket.socket, Answer]:
        """An open socket and the answer `ok`. Starts a keeper where there is none, another where it is stale."""
        line = json.dumps({**request, "version": agentqd.__version__, "config": config_stamp(self._config)})
        last: AgentqError | None = None
        for _ in range(STARTS_MAX):
            sock = self._connected()
            try:
                sock.settimeout(ANSWER_TIMEOUT_S)
                sock.sendall(line.encode() + b"\n")
                return sock, self._checked(_first_line(sock))
            except TimeoutError:
                sock.close()
                raise BoxUnreachable(
                    f"{self.name}: its keeper does not answer; end it: agentqctl box forget-connection {self.box}",
                    box=self.box,
                ) from None
            except OSError as error:
                sock.close()
                last = last or self._fell_over(str(error))
            except _StaleError as error:
                sock.close()
                last = BoxUnreachable(f"{self.name}: {error}", box=self.box)
                self._wait_gone()
            except BaseException:
                sock.close()
                raise
        assert last is not None
        raise last

    def _checked(self, line: bytes) -> Answer:
        answer = _decoded(line)
        if note := answer.get("note"):
            self._note(str(note))
        if answer.get("ok"):
            return answer
        if answer.get("error") == "stale":
            raise _StaleError(str(answer.get("message")))
        raise error_from_keeper(self.box, answer)

    def _connected(self) -> socket.socket:
        give_up = time.monotonic() + START_WAIT_S
        while True:
            try:
                return _connect(self._place.socket)
            except OSError:
                if time.monotonic() > give_up:
                    raise self._fell_over("it does not listen") from None
            started = _starting.pop(self._place.socket, None)
            try:
                word = _word(started or _spawn(self.box, self._config, self._place))
            except OSError as error:
                raise BoxUnreachable(
                    f"{self.name}: cannot start its keeper: {error.strerror or error}", box=self.box
                ) from error
            if not word:
                raise self._fell_over("it did not start")
            if word != b"listening":
                time.sleep(START_RETRY_S)  # another one has just begun, or is about to leave

    def _wait_gone(self) -> None:
        """A stale keeper leaves at once; its socket goes first."""
        give_up = time.monotonic() + 1.0
        while os.path.exists(self._place.socket) and time.monotonic() < give_up:
            time.sleep(START_RETRY_S)

    def _fell_over(self, why: str) -> BoxUnreachable:
        return BoxUnreachable(
            f"{self.name}: its keeper fell over ({why}); its last words are in {self._place.log}",
            box=self.box,
        )


class RemoteQueue:
    """The box's queue file, through the keeper; the same methods as `QueueFile`."""

    def __init__(self, kept: Kept) -> None:
        from agentqd.client.remotelines import LINE_BYTES_MAX

        self.line_bytes_max = LINE_BYTES_MAX
        self._kept = kept
        self._path: str | None = None

    @property
    def path(self) -> str:
        """On the box. Known once something was appended, else asked for."""
        if self._path is None:
            self._path = f"{self._kept.about()['state_dir']}/queue/tasks.jsonl"
        return self._path

    def append(self, lines: list[bytes]) -> None:
        """Appends each line, as many as fit in one packet at a time; each packet is durable before the next."""
        from agentqd.client.remotelines import packets

        assert all(b"\n" not in line for line in lines)
        bodies: Iterator[bytes] = packets(lines)
        for body in bodies:
            self._path = self._kept.append(body)

    def put_prompt(self, task_id: str, text: bytes) -> str:
        """Stores a payload too long for a line; its path for `prompt_ref`."""
        return self._kept.put(f"{task_id}.prompt", text)


class _StaleError(Exception):
    """Nothing was done, and another keeper may do it."""


class _Starting:
    """A keeper that has been started and has not yet said that it listens."""

    def __init__(self, pid: int, ready: int) -> None:
        self.pid = pid
        self.ready = ready


_starting: dict[str, _Starting] = {}
_started_pids: list[int] = []


def error_from_keeper(box: str, answer: Answer) -> AgentqError:
    """The keeper's refusal as the error that the same failure has on the box."""
    code = str(answer.get("error"))
    said = str(answer.get("message") or code)
    message = (
        said if said.startswith("box ") or code in ("no_such_box", "invalid_config") else f"box {box}: {said}"
    )
    known = ("ok", "error", "message", "unknown", "note", "code", "self")
    fields = {"box": box, **{name: value for name, value in answer.items() if name not in known}}
    if answer.get("unknown"):
        return AnswerLost(
            f"{message}; what became of it is unknown: say it again with the same --id", **fields
        )
    match code:
        case "no_daemon":
            return Unreachable(f"{message}; see: agentqctl box test {box}", **fields)
        case "forwarding_forbidden":
            return Unreachable(message, code=code, **fields)
        case "host_key_unknown" | "host_key_changed":
            return HostKeyRefused(message, code=code, **fields)
        case "not_permitted":
            return NotPermitted(message, **fields)
        case "disk_full":
            return RefusedForNow(message, code=code, **fields)
        case "no_folder" | "box_failed":
            return StateFolderError(message, code=code, **fields)
        case "no_such_box":
            return NoSuchBox(message, **fields)
        case "invalid_config":
            return ConfigError(message, **fields)
        case "unreachable" | "no_sftp":
            return BoxUnreachable(message, **fields)
    return AgentqError(message, code=code, **fields)


def _connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(CONNECT_TIMEOUT_S)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


def _read_line(sock: socket.socket) -> bytes:
    """One line and nothing behind it: the bytes that follow belong to the channel. Empty where the keeper went away."""
    line = b""
    while not line.endswith(b"\n"):
        ahead = sock.recv(4096, socket.MSG_PEEK)
        if not ahead or len(line) > ANSWER_BYTES_MAX:
            return b""
        end = ahead.find(b"\n")
        line += sock.recv(len(ahead) if end < 0 else end + 1)
    return line


def _first_line(sock: socket.socket) -> bytes:
    line = _read_line(sock)
    if not line:
        raise ConnectionResetError("it left without a word")
    return line


def _decoded(line: bytes) -> Answer:
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {"ok": False, "error": "stale", "message": "not a keeper"}


def _spawn(box: str, config: str, place: Place) -> _Starting:
    """A keeper of its own: nothing of ours but the pipe it says its one word to. It leaves our session once logged in."""
    _reap()
    ready, word = os.pipe()
    try:
        os.set_inheritable(word, True)
        argv = [sys.executable, "-P", "-m", "agentqd.client.keeper", box, config, *place, str(word)]
        null, log = os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, null, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, null, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, place.log, log, 0o600),
        ]
        pid = os.posix_spawn(sys.executable, argv, os.environ, file_actions=actions)
    except BaseException:
        os.close(ready)
        raise
    finally:
        os.close(word)
    _started_pids.append(pid)
    return _Starting(pid, ready)


def _word(started: _Starting) -> bytes:
    """`listening`, `other`, or nothing where it died before."""
    with os.fdopen(started.ready, "rb", buffering=0) as pipe:
        return pipe.read(WORD_BYTES_MAX) or b""


def _reap() -> None:
    """`wait` may see many keepers come and go; none stays a zombie."""
    for pid in list(_started_pids):
        with suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
        _started_pids.remove(pid)
