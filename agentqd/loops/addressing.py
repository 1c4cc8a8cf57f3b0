"""Where a handed-over entry goes: its own `deliver_to`, else its task's, the routes, the defaults.

What it names itself is a worker's word, and hostile: names are checked before they become rows, and at most so many are
taken. A sink that is not there (`no_such_sink`) or not allowed (`not_allowed`) gets a row that is dead at once, with the
reason, and an alert; the entry's other sinks and `completions` get it as usual. A person may still send such a row
(`outbox retry`): theirs is the last word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from agentqd.core.limits import DELIVER_TO_MAX, SINK_ERROR_CHARS_MAX, UNKNOWN_SINKS_MAX
from agentqd.core.resolve import resolve
from agentqd.core.routing import REJECTED, Subject, forbidden, known_sink, sinks_for
from agentqd.core.selfaddress import misspelt
from agentqd.core.task import TaskRequest
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.storage.tasks import TaskRow
from agentqd.storage.transaction import Transaction

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")  # as the config's names
ENTRY_TYPE: Final = "agentq.task.entry"
NO_SUCH_SINK: Final = "no_such_sink: the config has none of this name"
_NAMES_KEY: Final = "unknown_sinks"
_ROOM_AFTER_US: Final = (
    3_600_000_000  # the sums that say whether a name has rows are written after this transaction's units
)


class Address(msgspec.Struct, frozen=True):
    sinks: list[str]  # all that get a row
    refused: dict[str, str] = {}  # sinks whose row is dead at once: why
    left_out: dict[str, str] = {}  # names that get no row at all: why


def names_problem(fields: Mapping[str, Any]) -> str | None:
    """Why an entry's `deliver_to` cannot be read at all, or None."""
    mistyped = misspelt(fields)
    if mistyped is not None:
        return f"malformed: {mistyped[:60]!r} is no field of an entry; did you mean deliver_to?"
    wanted = fields.get("deliver_to")
    names = [wanted] if isinstance(wanted, str) else wanted
    if names is None:
        return None
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return "malformed: deliver_to is not a list of sink names"
    if len(names) > DELIVER_TO_MAX:
        return f"malformed: deliver_to names more than {DELIVER_TO_MAX} sinks"
    for name in names:
        if not _NAME.fullmatch(name) or name == REJECTED:
            return f"malformed: deliver_to: {name[:64]!r} cannot be a sink's name"
    return None


def own_sinks(fields: Mapping[str, Any] | None) -> list[str] | None:
    """The sinks that an entry names itself, once `names_problem` has found nothing; None: it says nothing."""
    value = (fields or {}).get("deliver_to")
    return [value] if isinstance(value, str) else value


def address_of(
    tx: Transaction, box: Box, task: TaskRow, request: TaskRequest, own: list[str] | None
) -> Address:
    """What a task names was checked when it came in, and stands; only an entry's own names are looked at here."""
    settings = box.settings
    subject = Subject(ENTRY_TYPE, task.queue, task.runner, "", tuple(request.labels or ()))
    if own is None:
        defaults = resolve(request, task.queue, task.runner, settings).deliver_to
        return Address(sinks_for(settings, subject, request.own_sinks(), defaults))
    unknown = [name for name in dict.fromkeys(own) if not known_sink(settings, name)]
    kept = _kept_names(tx, unknown) if unknown else set()
    refused = {name: NO_SUCH_SINK for name in unknown if name in kept}
    left_out = {name: NO_SUCH_SINK for name in unknown if name not in kept}
    for problem in forbidden(settings, task.queue, task.runner, own):
        if problem.sink not in unknown:
            refused[problem.sink] = f"not_allowed: {problem}"[:SINK_ERROR_CHARS_MAX]
    named = [name for name in own if name not in left_out]
    return Address(sinks_for(settings, subject, named, ()), refused, left_out)


def _kept_names(tx: Transaction, names: list[str]) -> set[str]:
    """Those of these unknown names that may have rows: at most so many on the whole box (each is one more sink to show, and
    a worker may think up any number). A name makes room once its rows have gone."""
    row = tx.one("SELECT value FROM meta WHERE key = ?", (_NAMES_KEY,))
    known: dict[str, int] = {} if row is None else msgspec.json.decode(row[0], type=dict[str, int])
    new = [name for name in names if name not in known]
    if len(known) + len(new) > UNKNOWN_SINKS_MAX:
        known = {
            name: at for name, at in known.items() if tx.now_us < at + _ROOM_AFTER_US or _has_rows(tx, name)
        }
        new = [name for name in names if name not in known]
    new = new[: max(0, UNKNOWN_SINKS_MAX - len(known))]
    if new:
        known |= dict.fromkeys(new, tx.now_us)
        tx.execute(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)", (_NAMES_KEY, msgspec.json.encode(known).decode())
        )
    return known.keys() & set(names)


def _has_rows(tx: Transaction, sink: str) -> bool:
    return tx.one("SELECT 1 FROM outbox_counts WHERE sink = ? AND n <> 0", (sink,)) is not None


def tell_refused(tx: Transaction, box: Box, task: TaskRow, key: str, entry_id: str, address: Address) -> None:
    """An event for each row that is dead at once; one alert for a task and sink, however many entries name it."""
    for sink, reason in (address.refused | address.left_out).items():
        if sink in address.refused:
            tx.event(task.id, "delivery_dead", sink=sink, delivery_id=entry_id, reason=reason)
        message = f"what task {task.id} ({task.name}) handed over as {key!r} is not sent to {sink}: {reason}"
        alert(tx, box, "sink_refused", message, task=task, group="handed_over", key=f"{sink}:{reason.partition(':')[0]}",
              not_to=sink, sink=sink, entry_key=key, delivery_id=entry_id)  # fmt: skip
