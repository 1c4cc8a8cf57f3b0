"""Entries to a web receiver, as Standard Webhooks asks. Delivered means: it has answered 2xx, and that answer has come whole.

A delivery is a POST of the envelope as stored (`application/cloudevents+json`), with `webhook-id` (the delivery id, the
same each time), `webhook-timestamp` (of this try) and, with a `secret_file`, `webhook-signature`. An entry that is too
large for its envelope has its content in it (`largebody`).

Anything but 2xx is "later", 4xx too: a receiver that is set up wrongly today may be mended before the tenth try. Only 410
is more: the sink is disabled. Redirects are not followed, and there are no proxies: where entries go stands in the
config, in no environment and in no answer. What the receiver says beside its status is neither kept nor shown: it may
repeat the entry.

Lost answers: a 2xx of which a part is missing (its length, last chunk or the orderly end of its connection says so) is
"later", and the same id goes out again. A 2xx that is whole counts, whatever the connection does after it; so does one
that has gone on for 64 KiB, where we hang up.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Final

from agentqd import __version__
from agentqd.core.errors import ConfigError
from agentqd.core.limits import CONCURRENCY_MAX
from agentqd.core.retry import read_retry_after_s
from agentqd.core.weburl import read_url
from agentqd.sinks.base import Context, Deferred, Delivered, Delivery, Disabled, Found, Outcome, Rejected
from agentqd.sinks.httppost import Answer, HttpPost, Unanswered
from agentqd.sinks.largebody import Damaged, LargeBody
from agentqd.sinks.reason import bounded
from agentqd.sinks.signing import Signer, signature
from agentqd.sinks.signingkeys import SigningKeys
from agentqd.system.failpoints import failpoint

TIMEOUT_S: Final = 30.0
_BUSY: Final = frozenset({429, 503})
_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_LARGE_AT_ONCE: Final = 2  # each costs up to two MiB of memory, and a core while it is signed


class WebhookSink:
    batch_max = 1
    timeout_s = None  # HttpPost keeps the time
    notice_kind = "webhook_secret"

    def __init__(self, context: Context) -> None:
        settings = context.settings
        try:
            self._url = read_url(settings.url or "")
        except ValueError as problem:
            raise ConfigError(f"the sink {context.name} is of type webhook and its url {problem}") from None
        self.concurrency = settings.concurrency or CONCURRENCY_MAX
        self.notices: list[str] = []
        files = settings.secret_file or []
        self._keys = SigningKeys([files] if isinstance(files, str) else files, context.now_us)
        answer_s = float(settings.timeout or TIMEOUT_S)
        self._client = HttpPost(self._url, _headers(settings.headers or {}), answer_s, self.concurrency)
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE)
        self._now_us = context.now_us
        self._told: str | None = None

    async def open(self, last_position: int) -> list[Found]:  # noqa: ARG002  (it keeps no positions)
        return []

    async def deliver(self, batch: Sequence[Delivery]) -> Sequence[Outcome]:
        return [await self._deliver(delivery) for delivery in batch]

    async def close(self) -> None:
        await self._client.close()

    async def _deliver(self, delivery: Delivery) -> Outcome:
        refused = _refusal(delivery)
        if refused is not None:
            return Rejected(refused)
        try:
            keys = self._keys.now()
        except ConfigError as problem:  # never unsigned
            self._tell(problem.message)
            return Deferred(bounded(f"cannot be signed: {problem.message}"))
        self._told = None
        try:
            if delivery.blob_path is not None:
                async with self._large:
                    outcome = await self._send_large(delivery, delivery.blob_path, keys)
            else:
                outcome = await self._send(delivery, keys)
        except Unanswered as problem:
            return Deferred(bounded(problem.reason), connection=problem.connection, busy=problem.busy)
        if isinstance(outcome, Delivered):
            failpoint("webhook_delivered")
        return outcome

    def _tell(self, what: str) -> None:
        """Once: not with each of a thousand tries."""
        if what != self._told:
            self._told = what
            self.notices.append(f"nothing is sent, because nothing can be signed: {what}")

    async def _send(self, delivery: Delivery, keys: Sequence[bytes]) -> Outcome:
        body, now_us = delivery.payload, self._now_us()
        at_s = now_us // 1_000_000
        signed = signature(keys, delivery.delivery_id, at_s, body) if keys else None
        answer = await self._post(delivery, at_s, len(body), signed, body)
        return outcome_of(answer.status, answer.retry_after, now_us)

    async def _send_large(self, delivery: Delivery, path: str, keys: Sequence[bytes]) -> Outcome:
        now_us = self._now_us()
        at_s = now_us // 1_000_000
        try:
            body = LargeBody(delivery.payload, path)
            signed = await body.prepare(lambda: Signer(keys, delivery.delivery_id, at_s))
            answer = await self._post(delivery, at_s, body.length, signed, body)
        except Damaged as problem:
            return Rejected(str(problem))
        except OSError as problem:  # our own copy of the content
            return Deferred(bounded(f"{path}: {problem.strerror or problem}"))
        return outcome_of(answer.status, answer.retry_after, self._now_us())

    async def _post(
        self, delivery: Delivery, at_s: int, length: int, signed: str | None, body: bytes | LargeBody
    ) -> Answer:
        headers = {
            "Content-Length": str(length),
            "webhook-id": delivery.delivery_id,
            "webhook-timestamp": str(at_s),
        }
        if signed:
            headers["webhook-signature"] = signed
        return await self._client.post(headers, body)


def outcome_of(status: int, retry_after: str | None, now_us: int) -> Outcome:
    """What an answer means."""
    if 200 <= status < 300:
        return Delivered()
    said = f"HTTP {status} {_phrase(status)}".rstrip()
    if status == HTTPStatus.GONE:
        return Disabled(f"{said}: the receiver wants nothing any more")
    if 300 <= status < 400:
        return Deferred(f"{said}: redirects are not followed; put the new place into the config")
    return Deferred(said, retry_after_s=read_retry_after_s(retry_after, now_us), busy=status in _BUSY)


def _phrase(status: int) -> str:
    """Ours, not the receiver's."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def _refusal(delivery: Delivery) -> str | None:
    """Why it can never be sent, or None. The id stands in a header."""
    if not _ID.fullmatch(delivery.delivery_id):
        return "its delivery id cannot be a header"
    payload = delivery.payload
    if payload[:1] != b"{" or payload[-1:] != b"}":
        return "the payload is not a JSON object"
    return None


def _headers(given: dict[str, str]) -> dict[str, str]:
    """Those of each request. Config rules keep `given` from naming ours."""
    ours = {
        "User-Agent": f"agentqd/{__version__}",
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "Content-Type": "application/cloudevents+json",
    }
    named = {name.lower() for name in given}
    return {name: value for name, value in ours.items() if name.lower() not in named} | given
