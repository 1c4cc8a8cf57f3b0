"""`pull --to DIR`: the files of each row, put away so that a cut at any instant leaves nothing half and nothing twice.

    DIR/NAME-ID/             stdout, stderr, artifacts/..., problems.json (only if there are any), result.json (the row)
    DIR/NAME-ID/entries/KEY  what the worker handed over, each as it comes
    DIR/.agentqctl/          ours: lock, and a folder for each row that is not acknowledged yet

The states that a cut can leave (docs/laptop.md, P0 to P4):
1. In `.agentqctl/DELIVERY/files/` the files grow. Whole, summed and fsynced, `place` names their folder in DIR.
2. They are renamed into it one by one, `result.json` last: a folder with it is whole, one without it is not.
3. The row is told (printed, --exec run), marked with `told-CONSUMER`, acknowledged, and only then `.agentqctl/DELIVERY` goes.
A row that comes again is known by the `delivery_id` in its `result.json`: nothing is fetched, or told, a second time.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from agentqd.client.box import Box
from agentqd.client.durable import fsync_folder, write_durably
from agentqd.client.errors import BadAnswer
from agentqd.client.localnames import LocalNames, folder_name, part_name
from agentqd.client.patience import Patience
from agentqd.client.resultfiles import (
    CannotKeep,
    Problem,
    Row,
    explained,
    inline_content,
    local_path,
    problem_of,
    read_json,
    remarks,
    same_content,
    write_file,
)
from agentqd.client.transfer import FileProblem, Remote, fetch, list_files
from agentqd.core.errors import RefusedForNow

OURS = ".agentqctl"
DONE = ".done"  # what is being removed
RESULT = "result.json"
ITEMS = ("artifacts", "stdout", "stderr", "problems.json", RESULT)  # result.json last
PLACES_MAX = 10_000
_DELIVERY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TASK = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Meter(Protocol):
    """Who is told how a transfer goes."""

    def begin(self, name: str, total_bytes: int) -> None: ...
    def add(self, count: int) -> None: ...
    def end(self) -> None: ...


class Kept(NamedTuple):
    """Where a row's files are. `told`: it was printed before, only its acknowledgement was lost."""

    folder: str | None
    problems: list[Problem]
    told: bool


class Results:
    """One folder of pulled results. `keep`, then tell, `mark_told`, acknowledge, `forget`: in this order, row by row."""

    def __init__(
        self, box: Box, folder: str, consumer: str, meter: Meter, patience: Callable[[], Patience]
    ) -> None:
        self._box = box
        self._told = f"told-{consumer}"  # another consumer has not been told by that
        self._folder = os.path.abspath(folder)
        self._ours = os.path.join(self._folder, OURS)
        self._meter = meter
        self._patience = patience

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """One pull at a time writes here. Raises RefusedForNow, CannotKeep."""
        with explained(self._folder):
            os.makedirs(self._folder, exist_ok=True)
            os.makedirs(self._ours, mode=0o700, exist_ok=True)
            lock = os.open(f"{self._ours}/lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RefusedForNow(
                    f"{self._folder}: another pull writes there; wait for it, or choose another folder"
                ) from None
            yield
        finally:
            os.close(lock)

    def keep(self, row: Row) -> Kept:
        """The row's files are in DIR, durably. Raises CannotKeep, BadAnswer, or what ended the patience."""
        delivery = row.get("delivery_id")
        if not isinstance(delivery, str) or not _DELIVERY.fullmatch(delivery):
            raise BadAnswer(f"a row has no readable delivery_id: {str(row)[:80]!r}")
        stage = os.path.join(self._ours, delivery)
        with explained(self._folder):
            if os.path.exists(f"{stage}/{self._told}"):
                return Kept(_read_place(stage, self._folder), [], told=True)
            if isinstance(row.get("status"), str):
                return self._keep_result(row, stage)
            if isinstance(row.get("key"), str) and isinstance(row.get("task_id"), str):
                return self._keep_entry(row, stage)
            return Kept(None, [], told=False)

    def mark_told(self, row: Row) -> None:
        """Printed, and --exec run: if only the acknowledgement is lost, the row is not told again."""
        stage = os.path.join(self._ours, row["delivery_id"])
        with explained(self._folder):
            os.makedirs(stage, exist_ok=True)
            os.close(
                os.open(
                    f"{stage}/{self._told}", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
                )
            )

    def forget(self, row: Row) -> None:
        """It will not come again."""
        self._remove(row["delivery_id"])

    def forget_all_but(self, rows: list[Row]) -> None:
        """Rows come in order: one that was told and is not among the first was acknowledged after all."""
        coming = {row.get("delivery_id") for row in rows}
        with explained(self._folder):
            for name in os.listdir(self._ours):
                is_over = name not in coming and os.path.exists(f"{self._ours}/{name}/{self._told}")
                if is_over or name.endswith(DONE):
                    self._remove(name)

    def _remove(self, name: str) -> None:
        """Renamed first: a folder that is removed in part must not look like one that is filled in part."""
        path = os.path.join(self._ours, name)
        with contextlib.suppress(OSError):  # tidying up: the next pull tries again
            if not name.endswith(DONE):
                os.rename(path, path + DONE)
                path += DONE
            shutil.rmtree(path)

    # A result and its files.

    def _keep_result(self, row: Row, stage: str) -> Kept:
        place = _read_place(stage, self._folder)
        if place is not None and not any(
            os.path.exists(f"{at}/{RESULT}") for at in (f"{stage}/files", place)
        ):
            shutil.rmtree(stage)  # it was put there whole, and somebody has taken it away since
            place = None
        if place is None:
            place, is_whole = self._choose_place(self._base_name(row), row)
            if is_whole:
                return Kept(place, read_json(f"{place}/problems.json") or [], told=False)
            problems = self._fill(row, f"{stage}/files")
            fsync_folder(self._ours)
            write_durably(f"{stage}/place", json.dumps(os.path.basename(place)).encode())
        else:
            problems = read_json(f"{stage}/files/problems.json") or read_json(f"{place}/problems.json") or []
        self._move(f"{stage}/files", place)
        return Kept(place, problems, told=False)

    def _fill(self, row: Row, files: str) -> list[Problem]:
        """Everything of this row into `files`, durably, its folders too."""
        os.makedirs(files, exist_ok=True)
        problems: list[Problem] = []
        task_id, attempt = row.get("task_id"), row.get("attempt")
        if isinstance(task_id, str) and _TASK.fullmatch(task_id) and isinstance(attempt, int) and attempt > 0:
            try:
                listing = list_files(self._box.connection, task_id, attempt, self._patience())
            except FileProblem as error:
                problems.append(problem_of(None, error.code, error.message))
            else:
                remotes = [item for item in listing.files if item.kind != "entry"]
                if listing.artifacts_truncated:
                    text = "more files were there than are recorded (see artifacts_truncated)"
                    problems.append(problem_of(None, "artifacts_truncated", text))
                self._fetch_all(row, remotes, files, problems)
        if problems:
            write_file(f"{files}/problems.json", json.dumps(problems, indent=2).encode())
        write_file(f"{files}/{RESULT}", json.dumps(row).encode() + b"\n")
        for folder, _, _ in os.walk(files, topdown=False):
            fsync_folder(folder)
        return problems

    def _fetch_all(self, row: Row, remotes: list[Remote], files: str, problems: list[Problem]) -> None:
        names = LocalNames()
        wanted = [item for item in remotes if not item.said.get("problem")]
        self._meter.begin(str(row.get("name") or row.get("task_id")), sum(item.bytes for item in wanted))
        try:
            for item in remotes:
                if item.said.get("problem"):
                    problems.append(
                        problem_of(item, str(item.said["problem"]), str(item.said.get("message")))
                    )
                    continue
                local = local_path(item, names)
                path = f"{files}/{local}"
                if item.kind == "artifact":
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                try:
                    fetch(self._box.connection, item, path, self._patience(), self._meter.add)
                except FileProblem as error:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
                    problems.append(problem_of(item, error.code, error.message))
                    continue
                problems += remarks(item, local)
        finally:
            self._meter.end()

    def _base_name(self, row: Row) -> str:
        for candidate in (row.get("task_id"), row.get("submitted_id"), row["delivery_id"]):
            if isinstance(candidate, str) and _TASK.fullmatch(candidate):
                return folder_name(row.get("name"), candidate)
        raise AssertionError("a delivery id is always there")

    def _choose_place(self, base: str, row: Row) -> tuple[str, bool]:
        """(the folder for this result, whether it is there already). Never one that holds something else."""
        for place in self._places(base):
            if not os.path.lexists(place):
                return place, False
            if not stat.S_ISDIR(os.lstat(place).st_mode):
                continue
            there = read_json(f"{place}/{RESULT}")
            if isinstance(there, dict) and there.get("delivery_id") == row["delivery_id"]:
                return place, True
            if all(name == "entries" or name.startswith(".") for name in os.listdir(place)):
                return place, False
        raise CannotKeep(f"{self._folder}: {PLACES_MAX} folders are called {base} already")

    def _places(self, base: str) -> Iterator[str]:
        """`NAME-ID`, and for a second run of the task (or another box's task) `NAME-ID.2`, ..."""
        for count in range(1, PLACES_MAX):
            yield os.path.join(self._folder, base if count == 1 else f"{base}.{count}")

    def _move(self, files: str, place: str) -> None:
        """What is still in `files` into `place`; `result.json` when all else is durable there."""
        os.makedirs(place, exist_ok=True)
        for item in ITEMS:
            if item == RESULT:
                fsync_folder(place)
                fsync_folder(self._folder)
            with contextlib.suppress(FileNotFoundError):  # moved before a cut, or there was none
                os.rename(f"{files}/{item}", f"{place}/{item}")
        fsync_folder(place)

    # What a worker handed over before its end.

    def _keep_entry(self, row: Row, stage: str) -> Kept:
        place = next(
            (
                place
                for place in self._places(self._base_name(row))
                if _takes_entries_of(place, row["task_id"])
            ),
            None,
        )
        if place is None:
            raise CannotKeep(
                f"{self._folder}: {PLACES_MAX} folders are called like task {row['task_id']} already"
            )
        os.makedirs(stage, exist_ok=True)
        draft = f"{stage}/entry"
        problem = self._fetch_entry(row, draft)
        if problem is not None:
            return Kept(place if os.path.isdir(place) else None, [problem], told=False)
        os.makedirs(f"{place}/entries", exist_ok=True)
        try:
            name = part_name(row["key"])
        except ValueError as error:
            raise BadAnswer(
                f"an entry of task {row['task_id']} has a key that is no file's name: {error}"
            ) from None
        for count in range(1, PLACES_MAX):
            path = f"{place}/entries/{name}" + (f"~{count}" if count > 1 else "")
            if not os.path.lexists(path) or same_content(draft, path):
                os.rename(draft, path)
                break
        fsync_folder(f"{place}/entries")
        fsync_folder(place)
        fsync_folder(self._folder)
        return Kept(place, [], told=False)

    def _fetch_entry(self, row: Row, draft: str) -> Problem | None:
        content = inline_content(row)
        if content is not None:
            write_file(draft, content)
            return None
        task_id, attempt = row["task_id"], row.get("attempt")
        if not _TASK.fullmatch(task_id) or not isinstance(attempt, int):
            raise BadAnswer(f"an entry has no readable task: {str(row)[:80]!r}")
        try:
            listing = list_files(self._box.connection, task_id, attempt, self._patience())
            found = [item for item in listing.files if item.kind == "entry" and item.name == row["key"]]
            if not found:
                return {"path": row["key"], "reason": "file_gone", "message": "the box has it no longer"}
            item = found[0]
            if item.said.get("problem"):
                return problem_of(item, str(item.said["problem"]), str(item.said.get("message")))
            self._meter.begin(f"{row.get('name')}: {row['key']}", item.bytes)
            try:
                fetch(self._box.connection, item, draft, self._patience(), self._meter.add)
            finally:
                self._meter.end()
        except FileProblem as error:
            return {"path": row["key"], "reason": error.code, "message": error.message}
        return None


def _takes_entries_of(place: str, task_id: str) -> bool:
    if not os.path.lexists(place):
        return True
    if not stat.S_ISDIR(os.lstat(place).st_mode):
        return False
    there = read_json(f"{place}/{RESULT}")
    return there is None or (isinstance(there, dict) and there.get("task_id") == task_id)


def _read_place(stage: str, folder: str) -> str | None:
    name = read_json(f"{stage}/place")
    if not isinstance(name, str) or not name or "/" in name or name in (".", ".."):
        return None
    return os.path.join(folder, name)
