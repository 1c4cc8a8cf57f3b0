"""The completion queue: `completions.jsonl` in the state folder, one line a result or entry, in order, append only.

A line is the data object's bytes as stored, with `seq`, `delivery_id` and `"pulled": false` (and `type`, but for
results) spliced in at the end. Delivered means: appended and on the disk. When larger than the limit the file is
renamed to `completions-SEQ.jsonl`, SEQ being its last seq; a reader that has it open misses nothing of it. A reader
takes what a newline ends: while a large write is under way, the kernel shows it page by page.
"""

from __future__ import annotations

from agentqd.core.folders import Folders
from agentqd.sinks.appendsink import AppendSink
from agentqd.sinks.base import Context, Delivery
from agentqd.sinks.lines import mark_of, opened_data, quoted


class CompletionLines:
    numbered = True

    def line(self, delivery: Delivery, position: int) -> bytes:
        head = opened_data(delivery)
        if delivery.kind != "result":
            head += b'"type":%b,' % quoted(delivery.type)
        return b'%b"seq":%d,"delivery_id":%b,"pulled":false}\n' % (
            head,
            position,
            quoted(delivery.delivery_id),
        )

    def identify(self, line: bytes) -> tuple[str, int] | None:
        mark = mark_of(line)
        return mark if mark and mark[1] > 0 else None

    def ours(self, fragment: bytes) -> bool:  # noqa: ARG002  (a Lines method)
        return True  # the file is this program's alone


class Completions(AppendSink):
    checks_content = True  # it sends none: the line says the sum, and who pulls the file checks it

    def __init__(self, context: Context, bytes_max: int) -> None:
        path = Folders(context.state_dir, "").completions
        super().__init__(context, path, CompletionLines(), rotate_bytes=bytes_max)
