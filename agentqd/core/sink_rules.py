"""Rules of the config for one sink: which options its type needs and has, and what they may be. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from agentqd.core.config_problem import Problem, at_least_one, nearest
from agentqd.core.limits import SINK_CONCURRENCY_MAX
from agentqd.core.mailaddress import address, named_address, pattern
from agentqd.core.routing import COMPLETIONS, REJECTED
from agentqd.core.settings import Sink
from agentqd.core.weburl import read_url

Key = tuple[str | int, ...]
_LOOPBACK: Final = re.compile(r"127(?:\.[0-9]{1,3}){3}")
SMTP_PORTS: Final = {"starttls": 587, "tls": 465, "none": 25}
_WORD: Final = re.compile(r"[A-Za-z0-9_\[\]:.%@][A-Za-z0-9_\[\]:.%@+-]{0,254}")
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
_HEADER_VALUE: Final = re.compile(r"[\x20-\x7e]{0,4096}")
_OUR_HEADERS: Final = frozenset(
    {"host", "content-type", "content-length", "content-encoding", "transfer-encoding", "connection", "keep-alive", "expect", "te", "trailer", "upgrade"}
)  # fmt: skip
_COMMON: Final = frozenset(
    {"type", "timeout", "backoff", "backoff_max", "lifetime", "concurrency", "ordered", "rate"}
)
_KEYS: Final[dict[str, tuple[frozenset[str], frozenset[str]]]] = {  # type: (needed, allowed besides)
    "file": (frozenset({"path"}), frozenset()),
    "command": (frozenset({"command"}), frozenset()),
    "webhook": (frozenset({"url"}), frozenset({"secret_file", "headers"})),
    "email": (
        frozenset({"host", "from"}),
        frozenset({"port", "tls", "username", "password_file", "to", "allow_to"}),
    ),
    "ssh": (
        frozenset({"host", "path"}),
        frozenset({"port", "user", "identity_file", "known_hosts", "mode", "peer"}),
    ),
    "notify": (frozenset({"urls_file"}), frozenset()),
}


def check_sink(name: str, sink: Sink) -> Iterator[Problem]:
    """What is wrong with one sink's options, by its type."""
    key: Key = ("sinks", name)
    if name in {COMPLETIONS, REJECTED}:
        yield Problem(key, f"{name} is built in and always there")
        return
    if sink.type == COMPLETIONS:
        yield Problem((*key, "type"), "completions is built in and always there; no other sink has this type")
        return
    if sink.type not in _KEYS:
        yield Problem((*key, "type"), f"there is no type {sink.type!r}{nearest(sink.type, _KEYS)}")
        return
    needed, allowed = _KEYS[sink.type]
    given = {field for field in _given(sink) if field not in _COMMON}
    for field in sorted(needed - given):
        yield Problem(key, f"a sink of type {sink.type} needs {field}")
    for field in sorted(given - needed - allowed):
        types = [each for each, (a, b) in _KEYS.items() if field in a | b]
        yield Problem(
            (*key, field), f"a sink of type {sink.type} has no {field} (that is for {', '.join(types)})"
        )
    yield from _check_pace(key, sink)
    yield from _OF_TYPE.get(sink.type, _check_nothing)(key, sink)


def fields_of(type_: object) -> frozenset[str]:
    """The options that a sink of this type may have; empty for a type that there is not."""
    needed, allowed = _KEYS.get(type_, (None, None)) if isinstance(type_, str) else (None, None)
    return frozenset() if needed is None or allowed is None else needed | allowed | _COMMON


def _check_pace(key: Key, sink: Sink) -> Iterator[Problem]:
    """What every type has: times, and how many at once."""
    yield from at_least_one((*key, "concurrency"), sink.concurrency)
    if sink.concurrency is not None and sink.concurrency > SINK_CONCURRENCY_MAX:
        yield Problem((*key, "concurrency"), f"is at most {SINK_CONCURRENCY_MAX}")
    if sink.ordered and sink.concurrency is not None and sink.concurrency > 1:
        yield Problem(
            (*key, "concurrency"),
            f"{sink.concurrency}, but ordered: true sends one at a time; leave one of the two out",
        )
    for name in ("timeout", "lifetime", "backoff_max"):
        value = getattr(sink, name)
        if value is not None and value <= 0:
            yield Problem((*key, name), "must be more than zero; leave it out for the default")
    if sink.backoff is not None and sink.backoff_max is not None:
        longest = max(sink.backoff.steps_s)
        if longest > sink.backoff_max > 0:
            yield Problem(
                (*key, "backoff_max"),
                f"{sink.backoff_max:g}s is less than backoff ({longest:g}s), which it would cut short",
            )


def secret_place(key: Key, path: str | None) -> Iterator[Problem]:
    """A secret's file: an absolute path, or a systemd credential."""
    if path is not None and not path.startswith(("/", "$CREDENTIALS_DIRECTORY/")):
        yield Problem(key, f"{path!r} is neither an absolute path nor begins with $CREDENTIALS_DIRECTORY/")


def _check_nothing(key: Key, sink: Sink) -> Iterator[Problem]:  # noqa: ARG001
    yield from ()


def _check_file(key: Key, sink: Sink) -> Iterator[Problem]:
    if sink.path is not None and not sink.path.startswith("/"):
        yield Problem((*key, "path"), f"{sink.path!r} is not an absolute path")


def _check_command(key: Key, sink: Sink) -> Iterator[Problem]:
    if sink.command is not None and (not sink.command or not sink.command[0]):
        yield Problem((*key, "command"), "is an argv list; its first item is the program")


def _check_ssh(key: Key, sink: Sink) -> Iterator[Problem]:
    """Its path is that machine's: absolute, or from the home of the user who logs in there."""
    for name in ("host", "user", "peer"):
        value = getattr(sink, name)
        if value is not None and not _WORD.fullmatch(value):
            yield Problem((*key, name), f"{value!r} is no name")
    if sink.path is not None and (not sink.path or "\x00" in sink.path or sink.path.startswith("~")):
        yield Problem(
            (*key, "path"),
            f"{sink.path!r} is no path (one without a / at its start begins at the home there)",
        )
    if sink.mode == "append" and (sink.path or "").endswith("/"):
        yield Problem((*key, "path"), f"{sink.path!r} is a folder; mode append needs a file")
    if sink.port is not None and not 1 <= sink.port <= 65535:
        yield Problem((*key, "port"), f"{sink.port} is no port")
    for name in ("identity_file", "known_hosts"):
        value = getattr(sink, name)
        if value is not None and not value.startswith("/"):
            yield Problem((*key, name), f"{value!r} is not an absolute path")
    if sink.concurrency is not None and sink.concurrency > 1:
        yield Problem((*key, "concurrency"), "a sink of type ssh sends one at a time")


def _check_notify(key: Key, sink: Sink) -> Iterator[Problem]:
    yield from secret_place((*key, "urls_file"), sink.urls_file)


def _check_email(key: Key, sink: Sink) -> Iterator[Problem]:
    if sink.host is not None and not _WORD.fullmatch(sink.host):
        yield Problem((*key, "host"), f"{sink.host!r} is no name")
    if sink.port is not None and not 1 <= sink.port <= 65535:
        yield Problem((*key, "port"), f"{sink.port} is no port")
    yield from _bad((*key, "from"), named_address, [sink.from_] if sink.from_ is not None else [])
    yield from _bad((*key, "to"), address, [sink.to] if isinstance(sink.to, str) else sink.to or [])
    yield from _bad((*key, "allow_to"), pattern, sink.allow_to or [])
    for one, other in (("username", "password_file"), ("password_file", "username")):
        if getattr(sink, one) is not None and getattr(sink, other) is None:
            yield Problem((*key, one), f"needs {other}, too")
    if sink.username is not None and not (sink.username and sink.username.isprintable()):
        yield Problem((*key, "username"), "is empty or has control characters")
    if sink.username is not None and sink.tls == "none" and not is_loopback(sink.host or ""):
        yield Problem(
            (*key, "tls"), "none, but a password is never sent without TLS (only to this machine itself)"
        )
    yield from secret_place((*key, "password_file"), sink.password_file)


def is_loopback(host: str) -> bool:
    """Is this plainly this machine itself?"""
    return host == "localhost" or host in {"::1", "[::1]"} or bool(_LOOPBACK.fullmatch(host))


def _bad(key: Key, check: Callable[[str], object], values: list[str]) -> Iterator[Problem]:
    for value in values:
        try:
            check(value)
        except ValueError as error:
            yield Problem(key, str(error))


def _check_webhook(key: Key, sink: Sink) -> Iterator[Problem]:
    if sink.url is not None:
        try:
            read_url(sink.url)
        except ValueError as problem:
            yield Problem((*key, "url"), str(problem))
    files = [sink.secret_file] if isinstance(sink.secret_file, str) else sink.secret_file
    if files is not None and not files:
        yield Problem((*key, "secret_file"), "is an empty list; leave it out to send unsigned")
    for path in files or ():
        yield from secret_place((*key, "secret_file"), path)
    for name, value in (sink.headers or {}).items():
        if not _HEADER_NAME.fullmatch(name):
            yield Problem((*key, "headers"), f"{name!r} is no name of a header")
        elif name.lower() in _OUR_HEADERS or name.lower().startswith("webhook-"):
            yield Problem((*key, "headers"), f"{name} is set by agentqd itself")
        elif not _HEADER_VALUE.fullmatch(value):
            yield Problem((*key, "headers"), f"the value of {name} is not plain text on one line")
    lower = [name.lower() for name in sink.headers or {}]
    if len(set(lower)) != len(lower):
        yield Problem((*key, "headers"), "has one name twice")


def _given(sink: Sink) -> Iterator[str]:
    for field in msgspec.structs.fields(sink):
        if getattr(sink, field.name) is not None:
            yield field.encode_name


_OF_TYPE: Final[dict[str, Callable[[Key, Sink], Iterator[Problem]]]] = {
    "file": _check_file,
    "command": _check_command,
    "ssh": _check_ssh,
    "notify": _check_notify,
    "email": _check_email,
    "webhook": _check_webhook,
}
