"""The files beside the journal: durable writes, locks, the folder's id, prompts, environment files, the offline audit."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentqd.core.errors import ConfigError, InvalidTask, JournalError, StateFolderError
from agentqd.storage import files
from agentqd.storage.audit import verify_offline
from agentqd.storage.envfile import parse_env, read_env_files
from agentqd.storage.journal import Journal
from agentqd.storage.lock import take_lock
from agentqd.storage.paths import resolve_intents
from agentqd.storage.prompts import Missing, read_prompt
from agentqd.storage.state_id import load_state_id
from agentqd.system.clock import ManualClock


def test_a_durable_write_replaces_the_whole_file_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "x"
    old = os.umask(0o077)
    try:
        for content in (b"long content", b"short"):
            files.write_durably(str(path), content, 0o640)
            assert path.read_bytes() == content
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["x"]


def test_a_durable_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    path = tmp_path / "x"
    path.write_text("old")

    def fsync(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        files.write_durably(str(path), b"new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_an_append_behind_a_torn_line_costs_only_that_line(tmp_path: Path) -> None:
    path = tmp_path / "x"
    files.append_durably(str(path), b"one\n")
    with path.open("ab") as file:
        file.write(b"to")
    files.append_durably(str(path), b"two\n")
    assert path.read_bytes() == b"one\nto\ntwo\n"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/passwd", path)])
def test_only_regular_files_are_opened_or_appended_to(tmp_path: Path, make: object) -> None:
    path = str(tmp_path / "x")
    make(path)  # type: ignore[operator]
    with pytest.raises(OSError, match=r".+"):
        files.open_regular(path)
    with pytest.raises(OSError, match=r".+"):
        files.append_durably(path, b"x\n")


def test_a_rename_to_a_taken_name_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with pytest.raises(FileExistsError):
        files.rename_to_free_name(str(tmp_path / "a"), str(tmp_path / "b"))
    files.rename_to_free_name(str(tmp_path / "a"), str(tmp_path / "c"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"b": "b", "c": "a"}


def test_new_files_and_folders_have_the_mode_asked_for_and_old_ones_keep_theirs(tmp_path: Path) -> None:
    for _ in range(2):
        files.make_folder(str(tmp_path / "f"), 0o2770, os.getgid())
    files.create_empty(str(tmp_path / "f" / "x"), 0o660, os.getgid())
    assert [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "f", tmp_path / "f" / "x")] == [0o2770, 0o660]  # fmt: skip
    with pytest.raises(FileExistsError):
        files.create_empty(str(tmp_path / "f" / "x"), 0o600, None)


def test_a_second_daemon_is_refused_with_the_first_ones_pid(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    first = take_lock(path, "agentqd")
    with pytest.raises(StateFolderError, match=f"pid {os.getpid()}"):
        take_lock(path, "agentqd")
    assert not os.get_inheritable(first)
    os.close(first)
    os.close(take_lock(path, "agentqd"))
    with pytest.raises(StateFolderError, match="cannot open"):
        take_lock(str(tmp_path / "no" / "lock"), "agentqd")


def test_two_that_come_at_once_find_the_same_folder_id(tmp_path: Path) -> None:
    path = str(tmp_path / "state_id")
    with ThreadPoolExecutor(8) as threads:
        found = set(threads.map(load_state_id, [path] * 32))
    assert found == {load_state_id(path)}
    assert len(found.pop()) == 32
    assert os.listdir(tmp_path) == ["state_id"]


@pytest.mark.parametrize("content", ["", "x", "A" * 32, "a" * 33])
def test_a_folder_id_that_is_none_is_refused_and_not_made_up(tmp_path: Path, content: str) -> None:
    path = tmp_path / "state_id"
    path.write_text(content)
    with pytest.raises(StateFolderError, match="not a state id"):
        load_state_id(str(path))
    assert path.read_text() == content


# Prompts.


@pytest.fixture
def roots(tmp_path: Path) -> list[str]:
    made = [tmp_path / "prompts", tmp_path / "more"]
    for root in made:
        root.mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "prompts-evil").mkdir()
    (tmp_path / "prompts-evil" / "x").write_text("x")
    (made[0] / "a.txt").write_text("in prompts")
    (made[1] / "b.txt").write_text("in more")
    (made[0] / "out").symlink_to(tmp_path / "secret")
    (made[0] / "in").symlink_to("a.txt")
    return [str(root) for root in made]


@pytest.mark.parametrize(
    ("ref", "content"),
    [("a.txt", b"in prompts"), ("prompts/a.txt", b"in prompts"), ("b.txt", b"in more"), ("in", b"in prompts"), ("../prompts/a.txt", b"in prompts")],
)  # fmt: skip
def test_a_prompt_is_read_from_an_allowed_root(roots: list[str], ref: str, content: bytes) -> None:
    assert read_prompt(ref, roots, 1000) == content
    if ref == "a.txt":
        assert read_prompt(f"{roots[0]}/a.txt", roots, 1000) == content


@pytest.mark.parametrize("ref", ["out", "../secret", "../prompts-evil/x", "/etc/passwd", "../nowhere"])
def test_no_way_leads_out_of_the_roots(roots: list[str], ref: str) -> None:
    with pytest.raises(InvalidTask) as caught:
        read_prompt(ref, roots, 1000)
    assert caught.value.code == "prompt_outside"


def test_a_prompt_that_is_not_there_yet_is_missing(roots: list[str]) -> None:
    assert read_prompt("later.txt", roots, 1000) == Missing(f"{roots[0]}/later.txt")
    assert isinstance(read_prompt("a.txt/below", roots, 1000), Missing)


@pytest.mark.parametrize(
    ("content", "code"),
    [(b" \n", "empty_prompt"), (b"", "empty_prompt"), (b"\xff", "prompt_not_text"), (b"x" * 1001, "prompt_too_large"), (None, "prompt_unreadable")],
)  # fmt: skip
def test_what_is_no_prompt_says_why(roots: list[str], content: bytes | None, code: str) -> None:
    path = Path(roots[0], "bad")
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    with pytest.raises(InvalidTask) as caught:
        read_prompt("bad", roots, 1000)
    assert caught.value.code == code


def test_declared_paths_are_resolved_through_links_and_dots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ["a", "../w/a", str(tmp_path / "link" / "x"), "~/real/x", f"{tmp_path}/link/*/../y*"]
    found = resolve_intents(given, str(tmp_path / "w"))
    assert found == [
        (f"{tmp_path}/w/a", "a"),
        (f"{tmp_path}/real/x", given[2]),
        (f"{tmp_path}/real/y*", given[4]),
    ]
    with pytest.raises(InvalidTask, match="relative"):
        resolve_intents(["a"], None)


# Environment files.


def test_an_environment_file_is_read_as_it_stands(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text(
        '\ufeff# comment\n\nexport A=1\nB=\'a # $x "q"\'\nC="a\\n\\t\\"\\\\\\$\\x" # c\nD= bare value # c\nE=\nF=a#b\n'
    )
    two.write_text("A=2\n")
    assert read_env_files([str(one), str(two)]) == {
        "A": "2", "B": 'a # $x "q"', "C": 'a\n\t"\\$\\x', "D": "bare value", "E": "", "F": "a#b",
    }  # fmt: skip


@pytest.mark.parametrize("line", ["s3cret", "=s3cret", "1A=s3cret", "A B=s3cret", "A='s3cret", 'A="s3cret', "A='s3cret' x", "AGENTQ_X=s3cret", "A=s3cret\x00", "A=1\nA=s3cret"])  # fmt: skip
def test_a_mistake_in_an_environment_file_has_a_line_and_never_shows_a_value(line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_env(f"OK=1\n{line}\n", "/e")
    assert caught.value.message.startswith(("/e:2: ", "/e:3: "))
    assert "s3cret" not in str(caught.value.as_json())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.text(max_size=40))
def test_any_text_is_an_environment_or_a_config_error(text: str) -> None:
    try:
        found = parse_env(text, "/e")
    except ConfigError:
        return
    assert all("\x00" not in value for value in found.values())


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: None, lambda path: Path(path).write_bytes(b"\xff")])  # fmt: skip
def test_what_is_no_environment_file_is_named_and_never_waited_for(tmp_path: Path, make: object) -> None:
    path = str(tmp_path / "x")
    make(path)  # type: ignore[operator]
    with pytest.raises(ConfigError, match="x: "):
        read_env_files([path])


# The audit without a daemon.


async def test_the_chain_can_be_checked_offline_but_not_beside_a_daemon(tmp_path: Path) -> None:
    with pytest.raises(StateFolderError, match="no journal"):
        verify_offline(str(tmp_path))
    journal = Journal(str(tmp_path / "journal.db"), ManualClock().now_us)
    await journal.open()
    await asyncio.gather(*(journal.commit(lambda tx: tx.event(None, "said")) for _ in range(5)))
    await journal.close()
    assert verify_offline(str(tmp_path))["ok"] is True
    lock = take_lock(str(tmp_path / "agentqd.lock"), "agentqd")
    with pytest.raises(StateFolderError, match="already serves"):
        verify_offline(str(tmp_path))
    os.close(lock)
    with closing(sqlite3.connect(tmp_path / "journal.db")) as other:
        other.execute("UPDATE events SET at = 1 WHERE seq = 3")
        other.commit()
    assert verify_offline(str(tmp_path))["broken_at"] == 3
    (tmp_path / "journal.db").write_bytes(b"no database" * 1000)
    with pytest.raises(JournalError):
        verify_offline(str(tmp_path))
