"""Every verb says through `--box` what it says on the box, with the same exit code, as root and as an ordinary user."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from realbox import wait_for
from realsshd import Account, current_account

from agentqd.cli.group import VERBS
from tests.laptop.onelaptop import CTL, OneLaptop, one_laptop

pytestmark = [pytest.mark.real, pytest.mark.sshd]

# What differs from call to call: times, ages, counters of the process.
MOVING = re.compile(
    rb'"(uptime_s|age_s|oldest_age_s|rss_bytes|free_bytes|at|now|loop_lag_s|\w*_at|\w+_age_s|memory_bytes|cpu_s)": ?[^,}]+|'
    rb"up [0-9.]+[a-z]+|[0-9.]+ [KMG]iB(?: free)?|\b[0-9.]+(?:ms|s|m|h)\b"
)

DONE, QUEUED = "done-1", "later-1"
READING: list[tuple[str, ...]] = [
    ("status",),
    ("status", "--json"),
    ("list",),
    ("list", "--json"),
    ("list", "--state", "finished", "--name", "first"),
    ("show", DONE),
    ("show", DONE, "--json"),
    ("show", "nobody"),
    ("show", "nobody", "--json"),
    ("logs", DONE),
    ("logs", DONE, "--stderr"),
    ("logs", "-f", DONE),
    ("logs", "nobody"),
    ("wait", DONE),
    ("wait", "failed-1"),
    ("wait", DONE, "failed-1", "--json"),
    ("wait", "nobody"),
    ("wait", QUEUED, "--timeout", "100ms"),
    ("pull", "--no-ack", "--consumer", "c"),
    ("outbox",),
    ("outbox", "list", "--json"),
    ("outbox", "list", "--since", "1h", "--json"),
    ("outbox", "retry", "ALL", "--dry-run"),
    ("sink", "--json"),
    ("sink", "test", "completions"),
    ("sink", "enable", "nobody"),
    ("writes",),
    ("writes", "--json"),
    ("writes", "conflicts", "--json"),
    ("audit", "show", "--json"),
    ("audit", "verify", "--json"),
    ("config", "show"),
    ("config", "show", "--json"),
    ("config", "schema"),
    ("completion", "bash"),
    ("version",),
    ("status", "--nonsense"),
    ("submit",),
    ("submit", "echo x", "--env", "no-equals-sign"),
]
CHANGING: list[tuple[str, ...]] = [
    ("hold", QUEUED),
    ("hold", QUEUED, "--json"),
    ("release", QUEUED),
    ("cancel", QUEUED),
    ("cancel", "nobody"),
    ("retry", DONE, "nobody"),
    ("pause", "default"),
    ("resume", "default", "--json"),
    ("resume", "nonsense"),
    ("reload",),
    ("pull", "--consumer", "p", "--limit", "1"),
    ("pull", "--consumer", "p", "--limit", "1", "--json"),
    ("drain",),
    ("submit", "echo refused", "--id", "while-draining"),
    ("submit", "echo refused", "--id", "while-draining", "--json"),
]


def tidy(done: subprocess.CompletedProcess[bytes]) -> tuple[int, bytes, bytes]:
    """What must be the same."""
    return done.returncode, MOVING.sub(b"~", done.stdout), MOVING.sub(b"~", done.stderr)


def prepare(one: OneLaptop) -> None:
    """Tasks of every kind, submitted over SSH."""
    one.ok("submit", "echo out; echo err >&2", "--task", "first", "--id", DONE, "--wait")
    assert one.ctl("submit", "exit 3", "--id", "failed-1", "--wait").returncode == 3
    one.ok("submit", "echo x", "--id", QUEUED, "--not-before", "2099-01-01T00:00:00Z", "--writes", "/tmp/x")
    wait_for("both results", lambda: len(one.box.completions()) == 2)
    wait_for("delivery", lambda: all(row["state"] == "delivered" for row in one.json("outbox", "list")))


@pytest.fixture(scope="module", params=["root", "ordinary"])
def pair(request: pytest.FixtureRequest) -> Iterator[OneLaptop]:
    """A box whose verbs are compared."""
    if request.param == "ordinary":
        account: Account = request.getfixturevalue("ordinary_user")
    else:
        account = current_account()
    with one_laptop(account) as one:
        prepare(one)
        yield one


@pytest.mark.root
def test_every_reading_verb_says_the_same_here_and_over_ssh(pair: OneLaptop) -> None:
    for words in READING:
        assert tidy(pair.ctl(*words)) == tidy(pair.here(*words)), words
    assert len(pair.keepers()) == 1, "one connection served them all"


def test_no_verb_is_left_out() -> None:
    tried = {words[0] for words in [*READING, *CHANGING]}
    on_the_laptop = {"box", "flush", "spool"}
    assert set(VERBS) - tried - on_the_laptop == {"doctor", "enqueue"}, "compared above, or tested below"


def test_every_changing_verb_says_the_same_here_and_over_ssh() -> None:
    said = []
    for way in ("here", "ctl"):
        with one_laptop() as one:
            prepare(one)
            run = one.here if way == "here" else one.ctl
            said.append([tidy(run(*words)) for words in CHANGING])
    for words, here, over_ssh in zip(CHANGING, *said, strict=True):
        assert here[0] == over_ssh[0], words
        for local, remote in zip(here[1:], over_ssh[1:], strict=True):
            assert _neutral(local) == _neutral(remote), words


def _neutral(text: bytes) -> bytes:
    """Two boxes: their folders, hashes and times differ."""
    return re.sub(
        rb'aq-lap-\w+|[0-9a-f]{32,64}|"[0-9T:.-]+Z"|"duration_s": ?[0-9.]+|"pid": ?\d+|"(?:evidence|usage)": ?\{[^}]*\}',
        b"~",
        text,
    )


def test_enqueue_over_ssh_appends_whole_lines(one: OneLaptop) -> None:
    lines = [{"task": f"n{n}", "id": f"e{n}", "prompt": "echo " + "x" * 5000} for n in range(10)]
    told = one.ok("enqueue", stdin=b"\n".join(json.dumps(line).encode() for line in lines))
    assert told.split() == [f"e{n}".encode() for n in range(10)]
    assert one.ctl("wait", *(f"e{n}" for n in range(10))).returncode == 0
    assert not one.box.rejected()


def test_a_line_too_long_for_one_packet_is_refused_before_anything_is_written(one: OneLaptop) -> None:
    before = one.box.queue_file.read_bytes() if one.box.queue_file.exists() else b""
    lines = [{"task": "a", "prompt": "echo a"}, {"task": "b", "prompt": "x" * 17000}]
    done = one.ctl("enqueue", stdin=b"\n".join(json.dumps(line).encode() for line in lines))
    assert done.returncode == 65
    assert b"16383" in done.stderr
    assert (one.box.queue_file.read_bytes() if one.box.queue_file.exists() else b"") == before


def test_doctor_over_ssh_says_what_the_daemon_finds_and_that_the_box_answers(one: OneLaptop) -> None:
    checks = {check["name"]: check for check in one.json("doctor")["checks"]}
    assert checks["connection"]["ok"]
    assert "state folder" in checks or len(checks) > 3
    one.box.kill()
    done = one.ctl("doctor", "--json")
    assert done.returncode == 1
    (wrong,) = json.loads(done.stdout)["checks"]
    assert wrong["fix"] == "agentqctl box test box"


def test_a_relative_path_is_an_error_that_says_where_paths_are(one: OneLaptop) -> None:
    for option in ("--workdir", "--writes"):
        done = one.ctl("submit", "echo x", option, "build")
        assert done.returncode == 2
        assert b"absolute" in done.stderr
    one.ok("submit", "pwd", "--workdir", "/tmp", "--writes", "sub/file", "--id", "w", "--wait")
    assert one.ok("logs", "w") == b"/tmp\n"
    one.ok(
        "submit",
        "echo x",
        "--workdir",
        "/tmp",
        "--writes",
        "sub",
        "--id",
        "v",
        "--not-before",
        "2099-01-01T00:00:00Z",
    )
    assert [(claim["path"], claim["given"]) for claim in one.json("writes")] == [("/tmp/sub", "sub")]


def test_the_variable_names_the_box_and_an_option_beats_it(one: OneLaptop) -> None:
    assert one.run("status", AGENTQCTL_BOX="box").returncode == 0
    assert one.run("--box", "box", "status", AGENTQCTL_BOX="nonsense").returncode == 0
    assert one.run("status", "--box", "box", AGENTQCTL_BOX="nonsense").returncode == 0
    wrong = one.run("status", AGENTQCTL_BOX="bok")
    assert wrong.returncode == 2
    assert b"did you mean box?" in wrong.stderr
    local = one.run("--socket", "/nowhere", "status", AGENTQCTL_BOX="box")
    assert local.returncode == 69
    assert b"/nowhere" in local.stderr
    assert one.run("--box", "box", "--socket", "/nowhere", "status").returncode == 2


def test_wait_and_logs_outlast_a_restart_of_the_daemon(one: OneLaptop) -> None:
    one.ok("submit", "echo a; sleep 3; echo b", "--id", "t")
    with one.start("wait", "t") as waiting, one.start("logs", "-f", "t") as logs:
        wait_for("the first line", lambda: b"a" in one.ctl("logs", "t").stdout)
        one.box.kill()
        one.box.start()
        assert waiting.wait(30) == 0
        said, _ = logs.communicate(timeout=30)
    assert said == b"a\nb\n"


def test_the_consumer_is_the_laptop(one: OneLaptop) -> None:
    one.ok("submit", "echo x", "--id", "t", "--wait")
    one.box.until_pullable(1)
    assert json.loads(one.ok("pull"))["task_id"] == "t"
    assert one.ok("pull") == b""
    assert b'"t"' in one.here("pull").stdout, "the box's own consumer has not moved"
    name = (one.laptop.home / ".local/state/agentqctl/client-id").read_text().strip()
    assert re.fullmatch(r"[A-Za-z0-9_.-]+-[0-9a-f]{12}", name)


def test_all_boxes_at_once_and_an_absent_one_hides_none(one: OneLaptop) -> None:
    one.add("away", "ssh://nobody@127.0.0.1:1", "--state-dir", "/x")
    one.ok("submit", "echo x", "--id", "t", "--wait")
    one.box.until_pullable(1)
    text = one.run("--box", "all", "status")
    assert text.returncode == 69
    assert text.stdout.startswith(b"== box ==\n")
    assert b"== away ==" in text.stdout
    assert b"away" in text.stderr
    found = json.loads(one.run("list", "--json", "--box", "all").stdout)
    assert [task["id"] for task in found["box"]] == ["t"]
    assert found["away"]["error"] == "box_unreachable"
    rows = [json.loads(line) for line in one.run("--box", "all", "pull", "--json").stdout.splitlines()]
    assert [(row["box"], row.get("task_id"), row.get("error")) for row in rows] == [
        ("box", "t", None),
        ("away", None, "box_unreachable"),
    ]
    assert one.run("--box", "all", "pull", "--follow").returncode == 2
    assert one.run("--box", "all", "show", "t").returncode == 2


def test_a_verb_through_the_keeper_loads_no_ssh_library(one: OneLaptop) -> None:
    one.ok("submit", "true")  # from now on there is a spool folder
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *CTL[1:], "--box", "box", "status"],
        capture_output=True,
        timeout=60,
        check=True,
        env=one.laptop.env(),
    )
    loaded = {line.rpartition(b"|")[2].strip() for line in done.stderr.splitlines()}
    assert b"agentqd.client.kept" in loaded
    assert not loaded & {b"asyncssh", b"asyncio", b"yaml", b"msgspec", b"subprocess", b"hashlib", b"ssl"}
    assert b"agentqd.client.spoolfirst" in loaded
    assert b"agentqd.client.spool" not in loaded  # nothing waits in it
