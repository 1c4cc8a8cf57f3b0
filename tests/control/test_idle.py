"""A daemon with nothing to do lives: each of its loops goes on turning, or systemd's watchdog would end it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from conftest import MakeBox

pytestmark = pytest.mark.real

IDLE_S = 80.0  # more than `stalled_loop`, which cannot be less than 60 s, and a look of liveness
CONFIG = """
alerts: {stalled_loop: 60s}
limits: {rescan_every: 10m}
sinks:
  archive: {type: file, path: FOLDER/archive.jsonl}
  down: {type: webhook, url: "http://127.0.0.1:9/"}
routes: [{match: {}, deliver_to: [archive, down]}]
"""


@pytest.mark.timeout(180)
def test_after_its_last_task_every_loop_goes_on_turning(make_box: MakeBox, tmp_path: Path) -> None:
    """The watchdog is fed only while no loop is stalled: one condition for both."""
    box = make_box(CONFIG.replace("FOLDER", str(tmp_path)))
    script = "echo hi; echo part > $AGENTQ_OUTBOX/part.txt; sleep 1"
    box.ctl("submit", "--wait", "--writes", str(tmp_path / "place"), script)
    time.sleep(IDLE_S)
    assert "stalled" not in box.ctl("status", "--json").stdout.decode()
    assert "stalled" not in box.log.read_text()
