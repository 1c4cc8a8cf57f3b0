"""What is old goes and nothing else; a saved config edit applies or is told."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

import pytest

from agentqd.core.errors import ConfigError
from agentqd.core.outbox import RowEvent
from agentqd.core.settings import Queue, Settings
from agentqd.core.settings import Retention as Keep
from agentqd.core.units import Duration
from agentqd.loops.attachments import Attached
from agentqd.loops.dropfolder import Handed
from agentqd.loops.reload import Reload
from agentqd.loops.retention import Retention
from agentqd.storage import audit, outbox, setaside
from agentqd.storage.configfile import load_settings
from agentqd.storage.journal import Journal
from agentqd.system.inotify import Inotify, NoInotify

from .harness import Bench

DAY = 86400.0


async def _old(bench: Bench, *ids: str, deliver: bool = True) -> None:
    """Finished tasks with their folders, older than everything that is kept."""
    await bench.connect()
    for task_id in ids:
        await bench.add(id=task_id)
        Path(bench.folders.attempt(task_id, 1)).mkdir(parents=True)
        await bench.end(task_id)
    if deliver:
        await bench.deliver_all()
    bench.clock.advance(31 * DAY)


async def _sweep(bench: Bench) -> None:
    retention = Retention(bench.box)
    async with asyncio.timeout(20):
        while await retention._step():
            pass


async def _ids(bench: Bench) -> list[str]:
    return [row[0] for row in await bench.rows("SELECT id FROM tasks ORDER BY seq")]


async def test_old_delivered_tasks_go_with_everything_that_is_theirs(bench: Bench) -> None:
    await _old(bench, "a", "b")
    await bench.add(id="new")
    await _sweep(bench)
    assert await _ids(bench) == ["new"]
    assert os.listdir(bench.folders.tasks) == []
    for table in ("entries", "outbox", "tries", "intents", "dependencies"):
        assert await bench.rows(f"SELECT count(*) FROM {table}") == [(0,)], table


async def test_a_folder_whose_commit_did_not_happen_goes_back_and_one_whose_commit_did_goes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right before, and right after the commit; then the id is used again before the old folder has gone."""
    await _old(bench, "a", "b")
    tasks, aside = Path(bench.folders.tasks), Path(bench.folders.state) / ".removed"
    (tasks / "a" / "attempt-1" / "exit.json").touch()
    seqs = dict(await bench.rows("SELECT id, seq FROM tasks"))
    aside.mkdir()
    os.rename(tasks / "a", aside / f"{seqs['a']}.a")
    await Retention(bench.box).look()
    assert os.listdir(aside) == []
    assert (tasks / "a" / "attempt-1" / "exit.json").exists()

    monkeypatch.setattr(setaside, "remove", lambda paths: None)
    await _sweep(bench)
    monkeypatch.undo()
    assert await _ids(bench) == []
    assert os.listdir(tasks) == []
    again = await bench.add(id="a")
    assert again == "a"
    assert not (tasks / "a").exists(), "its worker finds nothing of the old one"
    retention = Retention(bench.box)
    await retention.look()
    assert not (tasks / "a").exists()
    assert len(retention._aside) == 2
    setaside.remove(retention._aside)
    assert os.listdir(aside) == []


async def test_a_unit_that_fails_puts_the_folders_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await _old(bench, "a")
    folder = Path(bench.folders.attempt("a", 1))

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(setaside, "make_durable", broken)
    assert not await Retention(bench.box)._step()
    assert folder.exists()
    assert await _ids(bench) == ["a"]
    assert ("retention_failed", "Input/output error") in [
        (event, str(fields.get("error"))[-18:]) for event, fields in bench.log.lines
    ]
    monkeypatch.undo()
    await _sweep(bench)
    assert await _ids(bench) == []


async def test_a_folder_that_cannot_be_moved_keeps_its_task_and_no_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _old(bench, "a", "b")
    real = os.rename

    def rename(old: str, new: str) -> None:
        if old.endswith("/a"):
            raise OSError(16, "Device or resource busy")
        real(old, new)

    monkeypatch.setattr(setaside.os, "rename", rename)
    await _sweep(bench)
    assert await _ids(bench) == ["a"]
    assert os.listdir(bench.folders.tasks) == ["a"]
    assert "task_folder_stuck" in [event for event, _ in bench.log.lines]


async def test_nothing_goes_that_is_young_active_undelivered_or_dead(bench: Bench) -> None:
    await _old(bench, "undelivered", "dead", "held", "dropped", deliver=False)
    await bench.do(lambda tx: outbox.change_row(tx, 2, "completions", RowEvent.GAVE_UP))
    await bench.do(lambda tx: outbox.change_row(tx, 3, "completions", RowEvent.HELD))
    await bench.do(lambda tx: outbox.change_row(tx, 4, "completions", RowEvent.DROPPED))
    await bench.add(id="young")
    await bench.end("young")
    await bench.add(id="active")
    await _sweep(bench)
    assert await _ids(bench) == ["undelivered", "dead", "held", "young", "active"]


async def test_a_task_that_another_still_waits_for_is_kept(bench: Bench) -> None:
    await bench.connect()
    await bench.add(id="a")
    await bench.add(id="b", after=["a"], max_attempts=2, backoff="9w")
    await bench.end("a")
    await bench.end("b", exit_code=1)
    await bench.deliver_all()
    bench.clock.advance(31 * DAY)
    await _sweep(bench)
    assert await _ids(bench) == ["a", "b"]


async def test_what_a_known_consumer_has_not_pulled_is_kept_for_its_time_and_then_told(bench: Bench) -> None:
    bench.box.apply(Settings(retention=Keep(tasks=Duration(DAY), unpulled=Duration(60 * DAY))))
    await _old(bench, "pulled", "unpulled")
    await bench.do(lambda tx: tx.execute("INSERT INTO consumers VALUES ('default', 1, 0)"))
    await _sweep(bench)
    assert await _ids(bench) == ["unpulled"]
    bench.clock.advance(30 * DAY)
    await _sweep(bench)
    assert await _ids(bench) == []
    assert len(await bench.alerts("unpulled_removed")) == 1


async def test_numbers_and_positions_are_never_used_again(bench: Bench) -> None:
    await _old(bench, "a", "b", "c")
    await _sweep(bench)
    last = await bench.journal.read(lambda c: outbox.last_position(c, "completions"))
    await bench.journal.close()
    bench.journal = bench.box.journal = Journal(bench.folders.journal, bench.clock.now_us)
    await bench.journal.open()
    await bench.add(id="d")
    assert (await bench.task("d")).seq == 4
    assert await bench.journal.read(lambda c: outbox.last_position(c, "completions")) == last == 3
    assert await bench.do(lambda tx: tx.next_entry_seq()) == 4


async def test_the_chain_loses_a_prefix_and_verifies_from_its_checkpoint(bench: Bench) -> None:
    await _old(bench, "a", "b")
    before = (await bench.rows("SELECT max(seq) FROM events"))[0][0]
    bench.clock.advance(60 * DAY)
    await bench.add(id="c")
    await _sweep(bench)
    progress = await bench.journal.read(lambda c: audit.step(c, audit.begin(c)))
    assert progress.broken_at is None
    assert progress.done
    assert progress.first == before + 1


@pytest.mark.parametrize("restart", [False, True])
async def test_a_chain_of_which_all_was_old_goes_on_with_new_numbers(bench: Bench, restart: bool) -> None:
    await bench.add(id="a")
    await bench.do(lambda tx: tx.event(None, "something"))
    (last,) = (await bench.rows("SELECT max(seq) FROM events"))[0]
    bench.clock.advance(100 * DAY)
    await _sweep(bench)
    assert await bench.rows("SELECT count(*) FROM events") == [(0,)]
    if restart:
        await bench.journal.close()
        bench.journal = bench.box.journal = Journal(bench.folders.journal, bench.clock.now_us)
        await bench.journal.open()
    await bench.do(lambda tx: tx.event(None, "new"))
    assert await bench.rows("SELECT seq FROM events") == [(last + 1,)]
    progress = await bench.journal.read(lambda c: audit.step(c, audit.begin(c)))
    assert (progress.broken_at, progress.events) == (None, 1)


async def test_a_large_entry_of_two_tasks_goes_with_the_last_of_them(bench: Bench) -> None:
    """Before schema 7 several entries could name one file."""
    await bench.connect()
    blob = Path(bench.folders.state, "blobs", "ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"large")
    handed = [Handed("x.bin", (1, 5, 1), "ab" * 32, 5, None, blob=str(blob))]
    for task_id in ("old", "new"):
        await bench.add(id=task_id)
        await bench.end(task_id, handed=handed)
        await bench.deliver_all()
        bench.clock.advance(20 * DAY)
    await _sweep(bench)
    assert await _ids(bench) == ["new"]
    assert blob.exists()
    bench.clock.advance(20 * DAY)
    await _sweep(bench)
    assert not blob.exists()


async def test_attachments_stay_as_long_as_the_last_entry_that_brings_them(bench: Bench) -> None:
    await bench.connect()
    blobs = Path(bench.folders.state, "blobs")
    blobs.mkdir()
    files = [Attached(str(blobs / (digit * 64)), "a", 1, digit * 64) for digit in "ab"]
    for file in files:
        Path(file.path).write_bytes(b"x")
    for task_id, brings in ("old", files), ("new", files[1:]):
        await bench.add(id=task_id)
        item = Handed("m.json", (1, 5, 1), f"{task_id:x<64}", 5, b'{"body": "x"}', attachments=tuple(brings))
        await bench.end(task_id, handed=[item])
        await bench.deliver_all()
        bench.clock.advance(20 * DAY)
    await _sweep(bench)
    assert await _ids(bench) == ["new"]
    assert [Path(file.path).exists() for file in files] == [False, True]
    bench.clock.advance(20 * DAY)
    await _sweep(bench)
    assert not Path(files[1].path).exists()
    assert await bench.rows("SELECT * FROM attachments") == []


async def test_an_id_is_remembered_for_its_dedup_ttl_whatever_retention_says(bench: Bench) -> None:
    await bench.connect()
    await bench.add(id="a", dedup_ttl="90d")
    await bench.end("a")
    await bench.deliver_all()
    bench.clock.advance(31 * DAY)
    await _sweep(bench)
    from agentqd.loops.admission import Duplicate

    (outcome,) = await bench.admit({"id": "a", "dedup_ttl": "90d"})
    assert isinstance(outcome, Duplicate)


async def test_much_to_remove_goes_in_steps(bench: Bench) -> None:
    await bench.admit(*({"id": f"t{n}", "expires_at": "2020-01-01T00:00:00Z"} for n in range(450)))
    from agentqd.loops.waking import Waker

    bench.clock.advance(1)
    await Waker(bench.box)._turn()
    await bench.deliver_all()
    bench.clock.advance(31 * DAY)
    retention = Retention(bench.box)
    left = []
    while await retention._step():
        left.append((await bench.rows("SELECT count(*) FROM tasks"))[0][0])
    assert left == [250, 50]
    assert await _ids(bench) == []


# Reload.


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "etc" / "agentqd.yaml"
    path.parent.mkdir()
    path.write_text("queues: {a: {concurrency: 1}}\n")
    return path


async def _reload(bench: Bench, config: Path, inotify: object = None, needed: bool = True) -> Reload:
    loaded = load_settings(str(config))
    bench.box.apply(loaded.settings)
    return Reload(bench.box, inotify or NoInotify(), str(config), needed, loaded.sha256)  # type: ignore[arg-type]


async def test_a_valid_edit_is_applied_and_told_in_the_chain(bench: Bench, config: Path) -> None:
    reload = await _reload(bench, config)
    told: list[Settings] = []
    bench.box.on_settings.append(lambda: told.append(bench.box.settings))
    assert await reload.now() is False
    config.write_text("queues: {b: {concurrency: 2}}\n")
    assert await reload.now() is True
    assert bench.box.settings.queues == {"b": Queue(concurrency=2)}
    assert told == [bench.box.settings]
    assert await bench.rows("SELECT event FROM events") == [("config_applied",)]


async def test_an_invalid_edit_keeps_the_old_settings_and_alerts_once(bench: Bench, config: Path) -> None:
    reload = await _reload(bench, config)
    before = bench.box.settings
    config.write_text("queuez: {}\nmax_workers: many\n")
    for _ in range(2):
        with pytest.raises(ConfigError, match="did you mean queues"):
            await reload.now()
    assert bench.box.settings is before
    assert reload.last_error is not None
    (data,) = await bench.alerts("bad_config")
    assert f"{config}:1" in data["message"]
    config.write_text("queues: {a: {concurrency: 1}}\n# mended\n")
    assert await reload.now() is False
    assert reload.last_error is None


async def test_an_edit_that_writes_to_a_file_of_agentqd_itself_is_refused(bench: Bench, config: Path) -> None:
    reload = await _reload(bench, config)
    before = bench.box.settings
    config.write_text(f"sinks: {{s: {{type: file, path: {bench.box.folders.completions}}}}}\n")
    with pytest.raises(ConfigError, match=r"is agentqd's own: completions\.jsonl"):
        await reload.now()
    assert bench.box.settings == before
    config.write_text(f"sinks: {{s: {{type: file, path: {bench.box.folders.state}/results.jsonl}}}}\n")
    assert await reload.now() is True


async def test_a_config_that_vanishes_changes_nothing_and_is_told(bench: Bench, config: Path) -> None:
    reload = await _reload(bench, config)
    config.unlink()
    with pytest.raises(ConfigError, match="gone"):
        await reload.now()
    assert bench.box.settings.queues


async def test_a_config_that_never_was_may_appear(bench: Bench, config: Path) -> None:
    config.rename(config.with_name("elsewhere"))
    reload = Reload(bench.box, NoInotify(), str(config), False, "")
    assert await reload.now() is False
    config.with_name("elsewhere").rename(config)
    assert await reload.now() is True


@pytest.mark.parametrize("how", ["write", "rename"])
async def test_a_saved_file_applies_by_itself_and_a_bad_one_stops_nothing(
    bench: Bench, config: Path, how: str
) -> None:
    inotify = Inotify()
    reload = await _reload(bench, config, inotify)
    loop = asyncio.create_task(reload.run())
    await bench.until(lambda: "reload" in bench.box.beats)

    def save(text: str) -> None:
        path = config if how == "write" else config.with_suffix(".new")
        path.write_text(text)
        if how == "rename":
            path.rename(config)

    save("nonsense: 1\n")
    await bench.until(lambda: reload.last_error is not None)
    save("max_workers: 17\n")
    await bench.until(lambda: bench.box.settings.max_workers == 17)
    loop.cancel()
    with suppress(asyncio.CancelledError):
        await loop
    inotify.close()
