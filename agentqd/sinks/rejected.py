"""What could not be accepted: `queue/rejected.jsonl`, one line a rejection: its data object and the `delivery_id`.

The position is the offset of the line's end: the lines carry no number. After the file was replaced or removed, what
is read back at the next start is its last batch.
"""

from __future__ import annotations

from agentqd.core.folders import Folders
from agentqd.sinks.appendsink import AppendSink
from agentqd.sinks.base import Context, Delivery
from agentqd.sinks.lines import mark_of, opened_data, quoted


class RejectionLines:
    numbered = False

    def line(self, delivery: Delivery, position: int) -> bytes:  # noqa: ARG002  (a Lines method)
        return b'%b"delivery_id":%b}\n' % (opened_data(delivery), quoted(delivery.delivery_id))

    def identify(self, line: bytes) -> tuple[str, int] | None:
        return mark_of(line)

    def ours(self, fragment: bytes) -> bool:  # noqa: ARG002  (a Lines method)
        return True  # the file is this program's alone


class RejectedFile(AppendSink):
    checks_content = True  # it sends none

    def __init__(self, context: Context) -> None:
        super().__init__(context, Folders(context.state_dir, "").rejected, RejectionLines())
