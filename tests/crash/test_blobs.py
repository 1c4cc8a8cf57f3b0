"""Copies in blobs/ (docs/crash-states.md, a to f): killed at every system call; and under a real daemon, killed with a copy in its
hand, and left to run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
from conftest import MakeBox
from realbox import RealBox, wait_for

from agentqd.storage.blobs import digest_of, names_of, remove_left_over
from crash.checker import check_all, query, wait_until_at_rest
from crash.processes import daemon_died, reap_killed

pytestmark = pytest.mark.real

LARGE = 300_000
MAIL = json.dumps({"to": "a@example.org", "body": "see it", "attachments": ["../work/report"]})


CALLS = ("write", "fsync", "rename", "linkat", "unlink", "mkdir")
# Says what it holds, and what it is about to give up.
HOLDER = """
import os, sys
from agentqd.storage.blobs import copy_in, remove

folder, source = sys.argv[1:]


def take(content):
    with open(source, "wb+", buffering=0) as file:
        file.write(content)
        path = copy_in(file.fileno(), len(content), folder).path
    os.write(1, f"+{path}\\n".encode())
    return path


def give_up(path):
    os.write(1, f"-{path}\\n".encode())
    remove([path])


first, second, other = take(b"same" * 9999), take(b"same" * 9999), take(b"other")
give_up(first)
give_up(other)
third = take(b"same" * 9999)
give_up(second)
give_up(third)
take(b"same" * 9999)
"""


@pytest.mark.root
@pytest.mark.parametrize("call", CALLS)
def test_killed_at_every_call_what_is_held_is_whole_and_the_rest_can_be_told(
    tmp_path: Path, call: str
) -> None:
    for when in count(1):
        folder = tmp_path / f"blobs-{when}"
        inject = ("-e", f"inject={call}:signal=SIGKILL:when={when}")
        done = subprocess.run(
            ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={call}", *inject, sys.executable, "-c", HOLDER, str(folder), str(tmp_path / "source")],
            stdout=subprocess.PIPE, check=False, timeout=30,
        )  # fmt: skip
        said = done.stdout.decode().split("\n")[:-1]
        held = {line[1:] for line in said if line[0] == "+"} - {line[1:] for line in said if line[0] == "-"}
        names = names_of(str(folder))
        for path in [f"{folder}/{name}" for name in names if not name.startswith(".tmp-")]:
            digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            assert digest_of(path.replace(".once-", "")) == digest, "what has a name is whole"
        assert held <= {f"{folder}/{name}" for name in names}
        spare = [name for name in names if f"{folder}/{name}" not in held]
        remove_left_over(str(folder), spare, 2e10)
        assert {f"{folder}/{name}" for name in names_of(str(folder)) if not name.startswith(".once-")} == held
        remove_left_over(str(folder), names, 2e10)
        remove_left_over(str(folder), names, 2e10)
        assert names_of(str(folder)) == []
        if done.returncode == 0:
            assert when > 1, f"no {call} at all"
            return
        assert when < 60


def lying(box: RealBox) -> set[str]:
    folder = box.state / "blobs"
    return {str(path) for path in folder.iterdir() if not path.name.startswith(".once-")}


def named(box: RealBox) -> set[str]:
    sql = "SELECT blob FROM entries WHERE blob IS NOT NULL UNION SELECT blob FROM attachments"
    return {path for (path,) in query(box, sql)}


def test_a_copy_that_a_killed_daemon_never_committed_goes_and_the_changed_file_is_taken(make_box: MakeBox) -> None:  # fmt: skip
    """Edge d: the mail is taken again at the next start, with what its attachment is by then."""
    box = make_box(start=False)
    box.env = {"AGENTQD_FAILPOINT": "handover_read:kill"}
    box.start()
    box.append(
        {
            "task": "t",
            "id": "t",
            "prompt": f"echo first > \"$AGENTQ_OUTBOX/../work/report\"; cat > $AGENTQ_OUTBOX/.m <<'END'\n{MAIL}\nEND\n"
            "mv $AGENTQ_OUTBOX/.m $AGENTQ_OUTBOX/mail.json; until [ -e $AGENTQ_OUTBOX/.go ]; do sleep 0.05; done; echo done",
        }
    )
    wait_for("the daemon's death", lambda: daemon_died(box))
    reap_killed(box)
    (lost,) = lying(box)
    assert Path(lost).read_text() == "first\n"
    assert named(box) == set()
    attempt = box.attempt_folder("t")
    (attempt / "work" / "report").write_text("second\n")
    (box.state / "blobs" / ".tmp-1-00").write_text("a piece")

    box.env = {}
    box.start()
    (mail,) = wait_for("the mail", lambda: box.entries("t"))
    (attempt / "outbox" / ".go").touch()
    wait_until_at_rest(box, "t")
    (kept,) = named(box)
    assert Path(kept).read_text() == "second\n"
    assert mail["attachments"][0]["path"] == kept
    wait_for("the piece to go", lambda: lying(box) == {lost, kept})
    check_all(box)

    box.stop()
    for path in (lost, kept):
        os.utime(path, (1, 1))  # long ago
    box.start()
    wait_for("the copy that nobody names to go", lambda: lying(box) == {kept})
    (told,) = wait_for("the log's line", lambda: box.events("blobs_left_over_removed"))
    assert told["count"] == 1
    assert Path(kept).read_text() == "second\n"


def test_what_is_handed_over_again_and_what_is_not_taken_leaves_no_copies_while_the_daemon_runs(make_box: MakeBox) -> None:  # fmt: skip
    box = make_box()
    put = f"head -c {LARGE} /dev/zero | tr '\\0' $N > $AGENTQ_OUTBOX/.p; mv $AGENTQ_OUTBOX/.p $AGENTQ_OUTBOX/large"
    script = f"for N in a b a; do {put}; sleep 0.4; done; echo x >> $AGENTQ_OUTBOX/large; exit 1"
    box.append({"task": "t", "id": "t", "prompt": script, "max_attempts": 2, "backoff": "0s"})
    wait_until_at_rest(box, "t")
    assert len(box.entries("t")) == 1
    assert len(named(box)) == 1
    assert len(box.alerts("entry_conflict")) == 2
    wait_for("one copy", lambda: lying(box) == named(box))
    check_all(box)
