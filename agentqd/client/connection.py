"""JSON calls to one daemon: what every verb uses. Errors come out typed, with the daemon's code and fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from agentqd.client.channel import Transport
from agentqd.client.errors import BadAnswer, error_from_answer
from agentqd.client.http import Answer, exchange, make_target
from agentqd.core.limits import KIB

REQUEST_TIMEOUT_S = 30.0
LONG_POLL_S = 25.0
# A large prompt may take its time; a link that is dead is the keeper's to notice.
SLOW_UPLINK_BYTES_PER_S = 32 * KIB
CONTACT_HEADER = "AgentQ-Client"

Query = dict[str, str | int | None]
Object = dict[str, Any]
T = TypeVar("T")


class Connection:
    """Calls over a transport. Stateless: a daemon may be restarted between two calls."""

    def __init__(
        self, transport: Transport, timeout_s: float = REQUEST_TIMEOUT_S, contact: str | None = None
    ) -> None:
        """`contact`: who calls, told with every request (`clientid.contact_of`): the box tries what waits for us at once."""
        self.transport = transport
        self.timeout_s = timeout_s
        self.contact = contact

    def through(self, transport: Transport) -> Connection:
        """The same, another way."""
        return Connection(transport, self.timeout_s, self.contact)

    def get(self, *path: str, query: Query | None = None, extra_s: float = 0.0) -> Object:
        """The decoded answer, always an object. `extra_s`: how long the server may sit on it (long poll). Raises AgentqError."""
        return self._call("GET", path, query or {}, None, extra_s)

    def post(self, *path: str, body: Any = None, extra_s: float = 0.0) -> Object:
        """The same for a call that changes something."""
        return self._call("POST", path, {}, encode_json({} if body is None else body), extra_s)

    def post_raw(self, *path: str, body: bytes, query: Query | None = None) -> Object:
        """The same with a body that is JSON already."""
        return self._call("POST", path, query or {}, body, 0.0)

    def get_bytes(self, *path: str, query: Query, extra_s: float = 0.0) -> tuple[bytes, dict[str, str]]:
        """A body that is not JSON, with its headers (lower-case names)."""
        with self._open("GET", path, query, None, extra_s) as answer:
            return answer.read(), answer.headers

    def stream(self, *path: str, headers: Mapping[str, str], extra_s: float = 0.0) -> Answer:
        """An answer whose body is read piece by piece. The caller closes it. Raises AgentqError."""
        return self._open("GET", path, {}, None, extra_s, headers)

    def _call(
        self, method: str, path: tuple[str, ...], query: Query, body: bytes | None, extra_s: float
    ) -> Object:
        with self._open(method, path, query, body, extra_s) as answer:
            value = _decode(answer)
        if not isinstance(value, dict):
            raise BadAnswer(f"the daemon's answer is not a JSON object: {str(value)[:60]!r}")
        return value

    def _open(
        self,
        method: str,
        path: tuple[str, ...],
        query: Query,
        body: bytes | None,
        extra_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        target = make_target(path, query)
        timeout_s = self.timeout_s + extra_s + len(body or b"") / SLOW_UPLINK_BYTES_PER_S
        if self.contact is not None:
            headers = {CONTACT_HEADER: self.contact, **(headers or {})}
        answer = exchange(self.transport, method, target, body=body, timeout_s=timeout_s, headers=headers)
        if answer.status < 300:
            return answer
        with answer:
            raise error_from_answer(answer.status, _decode(answer, strict=False))


def take(answer: Object, name: str, kind: type[T]) -> T:
    """A field that an answer must have. Raises BadAnswer."""
    value = answer.get(name)
    if not isinstance(value, kind):
        raise BadAnswer(f"the daemon's answer has no {name}: {str(answer)[:60]!r}")
    return value


def _decode(answer: Answer, *, strict: bool = True) -> Any:
    raw = answer.read()
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        if not strict:
            return None
        raise BadAnswer(f"the daemon's answer is not JSON: {raw[:60]!r}") from None


def encode_json(value: Any) -> bytes:
    """One line of compact JSON. Raises UnicodeEncodeError for text that is not Unicode (undecodable argv)."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8")
