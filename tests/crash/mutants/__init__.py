"""The code, broken in one place each time: a crash test that does not notice is worth nothing.

Each mutant is applied to a copy of the source tree; the cheapest test that must catch it is run there and must fail.
`python -m crash.mutants [NAME ...]` (in tests/) runs them by hand; test_mutants.py in the suite.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    test: str  # the test in tests/crash that must fail
    says: str  # and with these words: a test that fails for another reason has caught nothing
    or_hangs: bool = (
        False  # the mutant may also keep the box from ever coming to rest, before the test proper
    )
    everywhere: bool = False  # else `old` must stand in the file exactly once


MUTANTS = (
    Mutant(
        "commits are not synced",
        "agentqd/storage/connection.py",
        "PRAGMA synchronous=FULL",
        "PRAGMA synchronous=OFF",
        "test_order.py::test_each_step_waits_for_the_one_before",
        "before the fdatasync of the log",
    ),
    Mutant(
        "a submit is answered before its commit",
        "agentqd/control/submit.py",
        "        settled = await room.box.journal.commit(lambda tx: _decide(tx, room, candidate))\n",
        "        room.box.journal.submit(lambda tx: _decide(tx, room, candidate))\n"
        "        settled = Settled(Accepted(candidate.new.id, 0, State.QUEUED), None, None, None)\n",
        "test_order.py::test_a_submit_is_answered_after_its_commit",
        "the answer",
    ),
    Mutant(
        "the position is committed before its tasks",
        "agentqd/loops/intake.py",
        '        failpoint("lines_decided")\n        try:\n',
        '        failpoint("lines_decided")\n        try:\n'
        "            await self.box.journal.commit(lambda tx: sources.save(tx, chunk.positions, chunk.dropped))\n",
        "test_edges.py::test_edge_04_killed_at_the_writes_of_the_first_commits",
        "waited",
    ),
    Mutant(
        "Run is sent without hold before the claim is durable",
        "agentqd/loops/supervision.py",
        "msgspec.structs.replace(run, hold=True)",
        "run",
        "test_order.py::test_each_step_waits_for_the_one_before",
        "the order to start",
        or_hangs=True,
    ),
    Mutant(
        "Go is sent before the claim is durable",
        "agentqd/loops/scheduling.py",
        "            tx.after_commit(lambda: self._on_claims(claims))\n",
        "            tx.before_durable(lambda: box.journal._loop.call_soon(self._on_claims, claims))\n",
        "test_order.py::test_each_step_waits_for_the_one_before",
        "the order to start",
    ),
    Mutant(
        "a held Run is started",
        "agentqd/supervisor/registry.py",
        "        elif run.hold:\n",
        "        elif run.hold and not run.task:\n",
        "test_order.py::test_each_step_waits_for_the_one_before",
        "the start",
        or_hangs=True,
    ),
    Mutant(
        "result files are not synced",
        "agentqd/loops/evidence.py",
        "os.fsync(descriptor)",
        "os.fstat(descriptor)",
        "test_order.py::test_each_step_waits_for_the_one_before",
        "was not synced",
        everywhere=True,
    ),
    Mutant(
        "Forget is sent before the end is durable",
        "agentqd/loops/ends.py",
        '        failpoint("evidence_durable")\n',
        '        failpoint("evidence_durable")\n'
        "        for end in ready:\n            self._workers.forget(end.task_id, end.attempt)\n",
        "test_order.py::test_each_step_waits_for_the_one_before",
        "Forget",
    ),
    Mutant(
        "completions are marked before they are appended",
        "agentqd/loops/sinkrunner.py",
        '        failpoint("send_begun")\n',
        '        failpoint("send_begun")\n'
        "        from agentqd.loops.marking import record\n"
        "        said = [Delivered(position=row.entry_seq) for row in batch]\n"
        "        early = [mark_for(row, outcome, self.schedule, 0.0, 0) for row, outcome in zip(batch, said)]\n"
        "        await self.box.journal.commit(lambda tx: record(tx, self.box, batch, said, early))\n",
        "test_order.py::test_each_step_waits_for_the_one_before",
        "was it marked before it was written",
    ),
    Mutant(
        "completions are marked before they are synced",
        "agentqd/sinks/appendlog.py",
        "                os.fdatasync(self._fd)  # before any answer (crash state 22)\n",
        "",
        "test_order.py::test_each_step_waits_for_the_one_before",
        "completions.jsonl was not synced",
    ),
    Mutant(
        "what is in completions is not read back",
        "agentqd/loops/sinkrunner.py",
        "            if found:\n",
        "            if not found:\n",
        "test_edges.py::test_edges_21_to_23_a_result_is_in_completions_once[receiver_answered]",
        "more than once",
    ),
    Mutant(
        "a torn tail is not cut",
        "agentqd/sinks/appendlog.py",
        "        cut = not self._looked and not whole and self._lines.ours(fragment)\n",
        "        cut = False\n",
        "test_edges.py::test_edge_22_a_torn_line_is_cut_and_sent_again_under_its_id",
        "",
    ),
    Mutant(
        "dedupe is skipped",
        "agentqd/loops/admission.py",
        "        existing = self._known.get(item.new.id)\n",
        "        existing = None\n",
        "test_edges.py::test_edge_04_the_same_lines_again_are_duplicates_not_tasks",
        "",
    ),
    Mutant(
        "started is not exclusive",
        "agentqd/supervisor/folder.py",
        '    rename_new_at(_NOT_YET_STARTED, "started", folder.fd)\n',
        '    os.rename(_NOT_YET_STARTED, "started", src_dir_fd=folder.fd, dst_dir_fd=folder.fd)\n',
        "test_edges.py::test_edge_09_started_is_made_once_whoever_tries",
        "",
    ),
    Mutant(
        "started comes after the fork",
        "agentqd/supervisor/attempts.py",
        "            mark_started(folder)\n",
        "            context.after(0.0, lambda: mark_started(folder))\n",
        "test_order.py::test_each_step_waits_for_the_one_before",
        "started",
    ),
    Mutant(
        "exit.json comes before the tree is gone",
        "agentqd/supervisor/ending.py",
        "        if self._owner.ended and not members:\n            self._finish()\n        elif self._phase is _Phase.ALIVE:",
        "        if self._owner.ended:\n            self._finish()\n        elif self._phase is _Phase.ALIVE:",
        "test_edges.py::test_edge_13_exit_json_is_written_only_when_the_whole_tree_is_gone",
        "while processes of the tree lived",
    ),
    Mutant(
        "an end is told before exit.json is there",
        "agentqd/supervisor/registry.py",
        "        if folder is not None and not self._write(exited, folder):\n",
        "        if folder is not None and not self._context.after(0.05, lambda: self._write(exited, folder)):\n",
        "test_order.py::test_each_step_waits_for_the_one_before",
        "exit.json",
    ),
    Mutant(
        "a result is sent before its commit",
        "agentqd/loops/delivery.py",
        "            tx.after_commit(lambda: self._offer(given, fresh))\n",
        "            self.box.journal._loop.call_soon_threadsafe(self._offer, given, fresh)\n",
        "test_order.py::test_each_step_waits_for_the_one_before",
        "the result's line",
    ),
    Mutant(
        "a claim that was not sent is lost",
        "agentqd/loops/reconcile.py",
        "            counts[await _begin(box, supervision, row)] += 1\n",
        "            lost.append(row)\n",
        "test_edges.py::test_edge_06_a_durable_claim_that_was_not_sent_is_sent_again",
        "lost",
    ),
    Mutant(
        "whoever started and left no exit.json runs again",
        "agentqd/loops/reconcile.py",
        "            lost.append(row)\n",
        "            await box.journal.commit(lambda tx, row=row: withdraw_claim(tx, box, row[0]))\n"
        '            __import__("shutil").rmtree(box.folders.attempt(task.id, task.attempt))\n',
        "test_edges.py::test_edge_11_a_worker_whose_supervisor_died_is_ended_and_lost",
        "",
    ),
    Mutant(
        "a claim from outside outlives its process",
        "agentqd/loops/outside.py",
        "        ended = [claim for claim in claims if not is_alive(claim.holder, self.boot_id)]\n",
        "        ended = []\n",
        "test_outside_claims.py::test_the_command_and_its_keeper_killed_at_every_call",
        "the release of every claim",
    ),
    Mutant(
        "a COMMAND begins before its claim is held",
        "agentqd/cli/verbs/writesclaim.py",
        "    answer = _ask(call, wish, until)\n",
        '    _become(call, argv, wish["id"])\n    answer = _ask(call, wish, until)\n',
        "test_outside_claims.py::test_the_command_and_its_keeper_killed_at_every_call",
        "without its claim",
    ),
)


def copy_tree(to: Path) -> None:
    """What the tests need, without what they have left behind."""
    unwanted = shutil.ignore_patterns("__pycache__", ".hypothesis", "*.trace")
    for name in ("agentqd", "tests"):
        shutil.copytree(ROOT / name, to / name, ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", to)


def run_mutant(mutant: Mutant, folder: Path) -> subprocess.CompletedProcess[str]:
    """Break a copy, run the test in it."""
    copy_tree(folder)
    path = folder / mutant.file
    text = path.read_text()
    found = text.count(mutant.old)
    assert found == 1 or (found and mutant.everywhere), (
        f"{mutant.file} has changed: {mutant.name!r} finds its place {found} times"
    )
    path.write_text(text.replace(mutant.old, mutant.new))
    return run_test(mutant.test, folder)


def run_test(test: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """pytest, with the daemon and the supervisor from this copy too (PYTHONPATH)."""
    options = [
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        "--tb=short",
        f"--basetemp={folder}/tmp",
    ]
    command = [sys.executable, "-m", "pytest", *options, f"tests/crash/{test}"]
    env = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "AGENTQD_TEST_WAIT_S": "10",
    }
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=150, check=False
    )


def was_caught(mutant: Mutant, done: subprocess.CompletedProcess[str]) -> bool:
    """The test ran and failed as it should; anything else (it passed, it was not found, it could not begin) is no catch."""
    if (
        mutant.or_hangs
        and "1 error" in done.stdout
        and "every task finished and every row delivered" in done.stdout
    ):
        return True
    return done.returncode == 1 and "1 failed" in done.stdout and mutant.says in done.stdout
