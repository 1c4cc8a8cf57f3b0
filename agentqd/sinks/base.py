"""The plug point: what a sink is. One plug a file beside this one; none knows another; ONE conformance suite runs over all.

Rules for a plug:
1. It answers with a value for every delivery it was given: `Delivered`, `Deferred`, `Rejected` or `Disabled`. Raising, hanging
   or an answer of the wrong length counts as `Deferred` (the loop sees to it): the same id is sent again.
2. `Delivered` means: the receiver has said so, and what it said so about is durable there as the sink's docs promise.
   An ambiguous outcome is `Deferred`.
3. It sends the payload's bytes as they are and always says the delivery id. It never logs a payload or a secret.
4. It may be cancelled at any await (shutdown, time-out); it then leaves nothing half-open.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from agentqd.core.settings import Sink as SinkSettings


class Delivery(msgspec.Struct, frozen=True):
    """One outbox row, as a plug sees it."""

    delivery_id: str
    entry_seq: int
    type: str  # CloudEvents type: agentq.task.success, agentq.task.entry, agentq.alert.no_work, ...
    kind: str  # result, entry, alert, rejection
    key: str
    task_id: str | None
    payload: bytes  # the sealed envelope; core.envelope.data_of gives the data object's bytes
    created_at: int  # microseconds
    attempts: int  # how many tries came before this one
    blob_path: str | None = (
        None  # file with a large entry's content (the payload then names it); its name begins with its sha256
    )
    progress: bytes | None = None  # what a plug, mostly this one, said at an earlier try


class Delivered(msgspec.Struct, frozen=True):
    position: int | None = None  # the seq under which an append sink stored it
    detail: str | None = None


class Deferred(msgspec.Struct, frozen=True):
    """Later. `connection` counts towards the sink's breaker; nothing else does.

    `progress` comes back with the row's next try, over restarts too (at most PROGRESS_BYTES_MAX; None: as it was). It is
    forgotten when the row is delivered. It goes with a row that a person moves to another sink: a plug reads what its own
    type has written (by address or URL, never by a place in a config), and takes anything else for nothing.
    """

    reason: str
    retry_after_s: float | None = None  # what the receiver asked for; at most a day is waited
    connection: bool = (
        False  # the receiver could not be reached, or has fallen silent: others would fail likewise
    )
    busy: bool = False  # it was reached and is overwhelmed (time-out, 429): the type's `busy_min_s` counts
    progress: bytes | None = None


class Disabled(msgspec.Struct, frozen=True):
    """The receiver wants nothing any more (webhook 410): this row and all others of the sink are held until a person acts."""

    reason: str


class Rejected(msgspec.Struct, frozen=True):
    """For good: the row becomes `dead`, an alert goes out. `progress`: for the day when a person has it sent again."""

    reason: str
    progress: bytes | None = None


Outcome = Delivered | Deferred | Rejected | Disabled


class ExecResult(msgspec.Struct, frozen=True):
    exit_code: int | None
    signal: int | None = None
    timed_out: bool = False
    error: str | None = None  # could not be started
    output: str = ""


class Exec(Protocol):
    """Runs a foreign command through the supervisor. Raises SupervisorUnavailable."""

    def __call__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        timeout_s: float,
        stdin: str | None = None,
        stdin_path: str | None = None,
    ) -> Awaitable[ExecResult]: ...


class Context(msgspec.Struct, frozen=True):
    """What a plug may use of the daemon."""

    name: str
    settings: SinkSettings
    state_dir: str
    exec: Exec
    now_us: Callable[[], int]
    file_mode: int = 0o600


class Found(msgspec.Struct, frozen=True):
    """A delivery that an append sink's file already holds: the daemon died between append and mark."""

    delivery_id: str
    position: int


class Sink(Protocol):
    """A plug that has `notices: list[str]` is asked for them after each batch: each becomes an alert of the kind
    `notice_kind` (without one: sink_file). One with `checks_content = True` looks at a large entry's file itself."""

    batch_max: int  # how many deliveries it takes at once (1 for most)
    concurrency: int  # batches under way at once, at most (core.pace starts lower and finds its way)

    @property
    def timeout_s(self) -> float | None:
        """Of one `deliver`; None: the plug itself ends each one within a time of its own."""
        ...

    async def open(self, last_position: int) -> list[Found]:
        """Called once before the first `deliver`; `last_position`: the highest position that the journal knows for it.

        An append sink cuts its own torn tail here and tells what it finds beyond `last_position`. Raising OSError is
        allowed: it is told, and tried again with backoff.
        """
        ...

    async def deliver(self, batch: Sequence[Delivery]) -> Sequence[Outcome]:
        """One outcome for each, in order."""
        ...

    async def close(self) -> None: ...
