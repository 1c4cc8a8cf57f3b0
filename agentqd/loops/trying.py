"""A person's test of one sink: an entry of its own goes through the plug right now, past breaker, rate, backlog and `disabled`.

It has the type `agentq.test` and a new delivery id, says that it is a test, and leaves no row behind, whatever becomes of
it; only an event. It is sent by a plug made for it, as the newest settings say, so that what is under way is not disturbed; a
`file` is appended to by its own plug, which alone may know the file's end.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import Final

import msgspec

from agentqd.core.envelope import TEST_TYPE, delivery_id, seal
from agentqd.core.errors import EXIT_NO_SUCH_TASK, AgentqError, ConfigError, IllegalTransition
from agentqd.core.limits import SINK_ERROR_CHARS_MAX
from agentqd.core.outbox import RowState
from agentqd.core.routing import COMPLETIONS, REJECTED
from agentqd.core.units import format_time
from agentqd.loops.delivery import DeliveryLoop
from agentqd.loops.sending import send
from agentqd.sinks.base import Deferred, Delivered, Outcome, Sink
from agentqd.sinks.registry import make_sink
from agentqd.storage.outbox import DueRow

TEST_MAX_S: Final = 90.0


class NoSuchSink(AgentqError):
    code = "no_such_sink"
    exit_code = EXIT_NO_SUCH_TASK
    http_status = 404


class Tried(msgspec.Struct, frozen=True):
    sink: str
    type: str
    delivery_id: str
    outcome: str  # delivered, deferred, rejected, disabled
    detail: str | None  # the receiver's answer, or why not
    retry_after_s: float | None
    took_s: float


async def try_sink(loop: DeliveryLoop, name: str) -> Tried:
    """Raises NoSuchSink, IllegalTransition (completions)."""
    box = loop.box
    if name in {COMPLETIONS, REJECTED}:
        text = f"{name} is not tested: its readers take every line of it by its number, and a line of no task would be one of them"
        raise IllegalTransition(text, sink=name)
    settings = box.settings.sinks.get(name)
    if settings is None:
        there_is = ", ".join(sorted(box.settings.sinks)) or "none but completions"
        raise NoSuchSink(f"there is no sink {name[:64]!r} in the config; there is {there_is}", sink=name[:64])
    row = _entry(loop, name)
    began = box.clock.monotonic_s()
    outcome = await _through(loop, name, row)
    took_s = round(box.clock.monotonic_s() - began, 3)
    what = type(outcome).__name__.lower()
    detail = outcome.detail if isinstance(outcome, Delivered) else outcome.reason[:SINK_ERROR_CHARS_MAX]
    await box.journal.commit(
        lambda tx: tx.event(None, "sink_tested", sink=name, delivery_id=row.delivery_id, outcome=what)
    )
    after_s = outcome.retry_after_s if isinstance(outcome, Deferred) else None
    return Tried(name, settings.type, row.delivery_id, what, detail, after_s, took_s)


async def _through(loop: DeliveryLoop, name: str, row: DueRow) -> Outcome:
    settings, runner = loop.box.settings.sinks[name], loop.runners.get(name)
    if settings.type == "file":
        if runner is None or not runner.is_open:
            why = runner.last_error if runner is not None else None
            return Deferred(why or "its file is not open yet")
        return await _send(loop, name, runner.plug, row)
    try:
        plug = make_sink(loop.context_of(name, settings), int(loop.box.settings.limits.completions_bytes_max))
    except ConfigError as error:
        return Deferred(error.message)
    try:
        await plug.open(0)
        return await _send(loop, name, plug, row)
    except OSError as error:
        return Deferred(str(error))
    finally:
        await plug.close()


async def _send(loop: DeliveryLoop, name: str, plug: Sink, row: DueRow) -> Outcome:
    try:
        async with asyncio.timeout(TEST_MAX_S):
            (outcome,) = await send(plug, name, [row], loop.box.log)
    except TimeoutError:
        return Deferred(f"no answer within {TEST_MAX_S:g} s", connection=True)
    return outcome


def _entry(loop: DeliveryLoop, name: str) -> DueRow:
    box, key = loop.box, f"test:{name}:{os.urandom(12).hex()}"
    now = box.clock.now_us()
    entry_id = delivery_id(box.state_id, "", 0, "alert", key)
    data = {
        "alert": "test",
        "message": f"a test of the sink {name}, asked for by a person (agentqctl sink test {name}); it is about no task",
        "at": format_time(now),
        "task_id": None,
        "name": None,
        "sink": name,
        "test": True,
    }
    payload = seal(entry_id, TEST_TYPE, box.name, None, now, data)
    digest = hashlib.sha256(payload).digest()
    return DueRow(
        0, name, RowState.PENDING, 0, now, entry_id, TEST_TYPE, "alert", key, None, payload, None, digest, now
    )
