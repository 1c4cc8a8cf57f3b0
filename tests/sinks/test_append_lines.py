"""The lines of the append sinks, and reading them from the end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from agentqd.core.envelope import data_of
from agentqd.sinks.completions import CompletionLines
from agentqd.sinks.tail import last_line_end, lines_backwards

from .conformance import delivery


def test_a_completions_line_is_the_datas_bytes_with_the_sinks_members_behind() -> None:
    result, entry = delivery(1, kind="result"), delivery(2)
    line = CompletionLines().line(result, 7)
    assert line == data_of(result.payload)[:-1] + (
        b',"seq":7,"delivery_id":"%b","pulled":false}\n' % result.delivery_id.encode()
    )
    assert "type" not in json.loads(line), "result lines carry status and no type"
    told = json.loads(CompletionLines().line(entry, 8))
    assert told["type"] == "agentq.task.entry"
    assert "status" not in told
    assert told["pulled"] is False


def test_a_foreign_line_with_an_absurd_seq_does_not_move_the_numbers() -> None:
    for seq in ("0", "-1", "9007199254740992", "1e400", '"7"', "null"):
        assert CompletionLines().identify(b'{"seq":%b,"delivery_id":"d"}' % seq.encode()) is None
    assert CompletionLines().identify(b'{"seq":5,"delivery_id":"d"}') == ("d", 5)
    assert CompletionLines().identify(b"[" * 100_000) is None
    assert CompletionLines().identify(b'{"seq":5,"delivery_id":"\xff"}') is None


@pytest.mark.parametrize("lengths", [[0], [5, 0, 3], [70_000, 1, 200_000, 64 * 1024 - 1, 0], [1] * 100_000])
def test_lines_are_read_backwards_whole_whatever_their_length(tmp_path: Path, lengths: list[int]) -> None:
    lines = [bytes([97 + index % 26]) * length for index, length in enumerate(lengths)]
    path = tmp_path / "lines"
    path.write_bytes(b"".join(line + b"\n" for line in lines) + b"torn")
    fd = os.open(path, os.O_RDONLY)
    try:
        end = last_line_end(fd, path.stat().st_size)
        assert end == path.stat().st_size - 4
        back = list(lines_backwards(fd, end))
        assert [line for _, line in back] == lines[::-1]
        assert all(os.pread(fd, len(line), offset) == line for offset, line in back[:50])
        assert last_line_end(fd, lengths[0]) == 0
    finally:
        os.close(fd)
