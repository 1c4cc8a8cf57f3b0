"""Each row's switch: a line of agentqd that, broken, makes that row's test fail. A test that cannot fail proves nothing.

    python tests/mission/switches.py [ROW...]     breaks each on a copy of the tree, runs the row's tests, prints a table

Exit code 1 if some test still passes with its mechanism broken, or a line to break is no longer there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
AT_ONCE = 2
LIMIT_S = 120
WAIT_S = 8  # of one wait in a test: with a broken mechanism it is waited for in vain
FAILED = 1  # pytest's exit code for "tests ran and some failed"


class Break(NamedTuple):
    file: str
    old: str
    new: str


class Switch(NamedTuple):
    row: int
    tests: str  # "module::test" (without test_ and .py), several with spaces
    breaks: tuple[Break, ...]


def _switch(row: int, tests: str, *breaks: str) -> Switch:
    """`breaks`: file, old, new, in threes."""
    threes = zip(breaks[::3], breaks[1::3], breaks[2::3], strict=True)
    return Switch(row, tests, tuple(Break(f"agentqd/{file}", old, new) for file, old, new in threes))


NO_INTAKE = ("loops/intake.py", "if not self.box.disk_low:", "if self.box.disk_low:")
NO_WATCH = (
    "loops/intake.py",
    "_FOLDER_MASK: Final = 0x2 | 0x8",
    "_FOLDER_MASK: Final = 0x400 | 0x01000000\n_OLD_MASK = 0x2 | 0x8",
)
BACK_PRESSURE = (
    "loops/scheduling.py",
    "if target is None or box.draining:",
    'if target is None or box.draining or tx.one("SELECT count(*) FROM outbox WHERE position > 9")[0]:',
)
NO_RETRY_TIMER = ("loops/backlog.py", "self._look_at = min([*due,", "_ = min([*due,")
HALF_LINES = (
    "core/lines.py", 'end = buffer.rfind(b"\\n", start) + 1', "end = len(buffer)",
    "core/lines.py", "left_over = len(parts.pop())", "left_over = 0",
)  # fmt: skip
NO_REFUSAL = ("loops/admission.py", "if met.decision is Decision.REFUSE:", "if False:")
NO_RELEASE = ("loops/unblocking.py", "    intents.release(tx, ended.seq)\n", "")
NO_ORDER = ("loops/unblocking.py", "    if before is not None:\n", "    if False:\n")

SWITCHES: tuple[Switch, ...] = (
    _switch(1, "verdicts::a_completion_line_says_everything_that_a_reader_needs", "loops/finishing.py", '"output_dir": box.folders', '"folder": box.folders'),
    _switch(2, "consumers::pulled_is_worked_out_for_each_consumer_and_the_line_never_changes", "control/completions.py", 'pulled = b"true" if position <= acknowledged else b"false"', 'pulled = b"false"'),
    _switch(3, "consumers::nobody_pulls_and_all_tasks_run", *BACK_PRESSURE),
    _switch(4, "consumers::fifty_results_wait_for_hours_and_are_drained_in_order", *BACK_PRESSURE),
    _switch(4, "laptop_pull::a_pull_that_dies_in_the_middle_goes_on_with_that_row_after_both_sides_have_been_off", "client/completions.py", 'seq = take(part[-1], "seq", int)', 'seq = take(rows[-1], "seq", int)'),
    _switch(5, "queue_file::a_line_of_task_submitted_at_and_prompt_ref_is_enough", "core/task.py", "if task.prompt is None and task.prompt_ref is None and task.command is None:", "if task.prompt is None and task.command is None:"),
    _switch(6, "prompts::a_prompt_ref_that_leads_out_of_its_root_is_refused", "storage/prompts.py", 'if not _inside(os.readlink(f"/proc/self/fd/{descriptor}"), root):', "if False:"),
    _switch(7, "queue_file::the_writer_may_die_right_after_its_append", *NO_INTAKE),
    _switch(8, "queue_file::half_a_line_waits_for_its_newline_and_then_runs_once queue_file::half_a_line_still_waits_after_a_restart", *HALF_LINES),
    _switch(9, "consumers::a_torn_tail_of_the_completion_file_is_cut_and_its_line_sent_again", "sinks/appendlog.py", "os.ftruncate(self._fd, end)", "pass"),
    _switch(10, "queue_file::a_torn_line_costs_only_itself", "core/lines.py", "return None if expects_value(prefix) else (prefix, raw[start:])", "return None"),
    _switch(11, "restarts::the_half_folders_of_a_crash_are_cleared_away_and_never_run", "supervisor/folder.py", "            _clear_for(task_fd, name)\n", "            pass\n"),
    _switch(12, "clocks::what_cannot_be_started_ends_as_spawn_failed_and_is_delivered", "core/verdict.py", "if ended.error is not None:", "if False:"),
    _switch(13, "consumers::an_offset_moves_forward_only_and_never_past_the_end", "control/completions.py", "mark = max(before[0] if before else 0, min(seq, queries.last_position(tx.connection)))", "mark = seq"),
    _switch(14, "restarts::a_worker_lost_with_its_supervisor_is_never_a_success_and_on_lost_says_what_follows", "loops/finishing.py", "return Verdict(Result.LOST, end.lost_reason", "return Verdict(Result.SUCCESS, end.lost_reason"),
    _switch(15, "queue_file::the_same_line_twice_runs_once", "loops/preparing.py", "return request.id, True", "return request.id + hashlib.sha256(place).hexdigest()[:4], True"),
    _switch(16, "restarts::what_waits_outlives_both_sides", "loops/scheduling.py", "self.paused = frozenset(row[0] for row in rows)", "self.paused = frozenset()"),
    _switch(17, "consumers::enqueue_and_submit_work_while_the_daemon_is_off_and_pull_while_the_writer_is", "client/tasks.py", "queue.append([line])", "pass"),
    _switch(17, "spool::each_side_works_while_the_other_is_off", "client/tasks.py", "queue.append([line])", "pass", "client/spool.py", 'os.rename(draft, f"{self.folder}/{entry.file}")', "os.unlink(draft)"),
    _switch(18, "queue_file::without_inotify_the_rescan_does_the_work", "loops/intake.py", "await self.inotify.wait(self.box.rescan_s)", "await self.inotify.wait(3600.0)"),
    _switch(19, "queue_file::a_line_starts_its_worker_within_milliseconds", *NO_WATCH),
    _switch(20, "clocks::an_idle_box_takes_next_to_nothing", "loops/liveness.py", "_EVERY_S: Final = 5.0", "_EVERY_S: Final = 0.002"),
    _switch(21, "queue_file::a_line_starts_its_worker_within_milliseconds", "loops/intake.py", "hints = await self.inotify.wait(self.box.rescan_s)", "hints = await self.inotify.wait(self.box.rescan_s); import asyncio; await asyncio.sleep(2)"),
    _switch(22, "queue_file::half_a_line_waits_for_its_newline_and_then_runs_once", *HALF_LINES),
    _switch(23, "queue_file::a_bad_line_is_kept_told_alerted_and_can_be_sent_again_mended", "loops/rejection.py", '_add(tx, box, kept_id, "rejection", place, "agentq.line.rejected", kept, REJECTED)', "pass"),
    _switch(24, "consumers::nobody_pulls_and_all_tasks_run", *BACK_PRESSURE),
    _switch(24, "laptop_pull::a_laptop_asleep_in_mid_pull_holds_nothing_up_and_then_gets_everything_in_order", *BACK_PRESSURE),
    _switch(25, "queue_file::a_writer_that_holds_the_rotated_file_open_loses_no_line", "storage/queuefolder.py", "self._rename_away(stamp)\n", "os.truncate(self._files.live_path, 0)\n"),
    _switch(26, "prompts::an_empty_or_blank_prompt_is_refused_at_the_door", "core/task.py", "if task.prompt is not None and not task.prompt.strip():", "if False:"),
    _switch(27, "queue_file::bytes_once_written_to_the_queue_file_never_change", "loops/intake.py", "            self.folder.committed(chunk)\n            self._one_at_a_time", '            self.folder.committed(chunk)\n            open(self.box.folders.queue_file, "w").close()\n            self._one_at_a_time'),
    _switch(28, "restarts::a_result_that_was_written_but_not_yet_marked_is_read_back_and_not_doubled", "sinks/appendlog.py", "found.update(self._look())", "self._look()"),
    _switch(29, "restarts::worker_daemon_and_supervisor_killed_at_once_come_back_once", "loops/nextattempt.py", 'again = resolved.on_lost == "requeue" and lost < LOST_REQUEUES_MAX', "again = False"),
    _switch(30, "queue_file::a_replay_inside_the_ttl_returns_the_first_id_and_after_it_runs_anew", "loops/admission.py", "if tx.now_us < first.finished_at + int(ttl_s * 1_000_000):", "if False:"),
    _switch(31, "outbox::a_receiver_that_loses_its_first_answer_gets_the_same_id_again", "sinks/command.py", '"AGENTQ_DELIVERY_ID": _clean(delivery.delivery_id),', '"AGENTQ_DELIVERY_ID": delivery.delivery_id + str(delivery.attempts),'),
    _switch(32, "restarts::a_second_daemon_is_refused_with_the_pid_of_the_first", "storage/lock.py", "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
    _switch(33, "restarts::a_large_entry_is_synced_renamed_and_its_folder_synced_before_the_journal_commits_it", "storage/blobs.py", "        os.fsync(out)\n", "        pass\n"),
    _switch(34, "restarts::a_large_entry_is_synced_renamed_and_its_folder_synced_before_the_journal_commits_it", "storage/blobs.py", "    fsync_folder(blobs)\n", "    pass\n"),
    _switch(35, "restarts::a_network_file_system_is_refused_with_a_clear_message", "daemon/folders.py", "if is_network(kind):", "if False:"),
    _switch(36, "queue_file::a_lock_on_the_queue_file_stops_nobody", "loops/intake.py", "        chunk = self.folder.read(", "        import fcntl; fcntl.flock(open(self.box.folders.queue_file), fcntl.LOCK_EX | fcntl.LOCK_NB)\n        chunk = self.folder.read("),
    _switch(37, "verdicts::a_second_cancel_and_a_wrong_move_change_nothing", "loops/operations.py", "if task.state is State.FINISHED:", "if False:", "core/lifecycle.py", "State.FINISHED: {Event.RETRY_REQUESTED: State.QUEUED},", "State.FINISHED: {Event.RETRY_REQUESTED: State.QUEUED, Event.CANCELLED: State.FINISHED},"),
    _switch(38, "queue_file::an_append_at_a_random_moment_of_the_start_is_never_missed", "loops/intake.py", "self._watch()  # before", "pass  # before"),
    _switch(39, "verdicts::exit_0_with_nothing_to_show_is_no_work_and_alerts", "core/verdict.py", "if nothing and not allow_no_work:", "if False:"),
    _switch(40, "verdicts::exit_0_without_the_expected_evidence_is_a_failure", "core/verdict.py", "unmet = _unmet(evidence, expect)", "unmet = None"),
    _switch(41, "verdicts::a_stale_artifact_is_not_success", "core/verdict.py", "if wanted.changed and not seen.changed:", "if False:"),
    _switch(42, "clocks::a_worker_that_falls_silent_is_ended_though_its_process_is_healthy", "supervisor/clocks.py", "if self._clocks.silence_s is not None:", "if False:"),
    _switch(43, "outbox::a_result_that_is_not_delivered_in_time_alerts_and_names_its_sink", "loops/liveness.py", "await self._check_deliveries()", "pass"),
    _switch(44, "clocks::a_deadline_ends_the_whole_tree_and_what_it_had_is_delivered", "supervisor/clocks.py", "if self._clocks.run_s is not None:", "if False:"),
    _switch(45, "control::show_tells_one_timeline_from_the_lines_offset_to_its_delivery", "control/views.py", '"source": msgspec.json.decode(task.source),', '"source": {"file": None, "offset": None},'),
    _switch(46, "audit::a_changed_event_is_found_and_verify_says_where", "storage/transaction.py", "text = f\"{seq}\\x00{at}\\x00{task or ''}\\x00{event}\\x00{data}\"", 'text = f"{seq}"'),
    _switch(47, "waiting::a_usage_limit_is_waited_for_by_the_whole_runner_and_uses_no_attempt", "loops/nextattempt.py", "limited = met(tx, box, task, limit) if limit is not None else None", "limited = None"),
    _switch(47, "verdicts::each_retry_is_recorded_waits_longer_and_is_capped", "loops/nextattempt.py", "again = verdict.result in RETRIED_RESULTS and task.run_attempts < resolved.max_attempts", "again = False"),
    _switch(48, "outbox::a_finished_task_is_not_a_delivered_one_and_it_shows", "loops/marking.py", "made(RowEvent.DEFERRED, attempts, due_at, None,", "made(RowEvent.ACKNOWLEDGED, attempts, None, None,"),
    _switch(49, "outbox::an_end_and_its_outbox_rows_are_in_one_transaction", "loops/finishing.py", "        add_result(tx, box, moved, end.request, data)\n", "        tx.later(lambda: box.journal.submit(lambda tx: add_result(tx, box, moved, end.request, data)) and None)\n"),
    _switch(50, "outbox::delivery_goes_on_after_its_worker_has_timed_out", *NO_RETRY_TIMER),
    _switch(51, "clocks::a_deadline_ends_the_whole_tree_and_what_it_had_is_delivered", "loops/evidence.py", "tail = _tail(asked, problems)", 'tail = ""'),
    _switch(52, "outbox::an_entry_is_delivered_while_its_worker_goes_on outbox::two_of_four_replies_survive_the_sigkill_of_their_worker", "loops/handover.py", "            if not live.ended:\n", "            if live.ended:\n"),
    _switch(53, "outbox::a_daemon_killed_in_mid_batch_picks_up_where_it_stopped", "storage/outbox.py", "state IN ('pending','delivering','retryable') AND due_at <= ?", "state IN ('pending','delivering','retryable','delivered') AND coalesce(due_at, 0) <= ?"),
    _switch(54, "outbox::a_hundred_pending_entries_drain_by_themselves_when_the_sink_is_up_again", *NO_RETRY_TIMER),
    _switch(55, "outbox::a_malformed_entry_among_good_ones_is_set_aside_told_and_blocks_nothing", "loops/dropfolder.py", "        if item.broken is not None:\n", "        if False:\n"),
    _switch(52, "mail::an_attachment_is_sent_as_it_was_handed_over_though_the_agent_has_deleted_it", "loops/attachments.py", "return Attached(copy.path,", 'return Attached(os.readlink(f"/proc/self/fd/{descriptor}"),'),
    _switch(55, "mail::a_reply_to_somebody_who_is_not_allowed_is_set_aside_told_and_the_others_go", "sinks/letter.py", "    _check_allowed((*to,", "    _ = ((*to,"),
    _switch(56, "mail::four_replies_of_an_agent_that_is_killed_after_the_second_arrive_once_each_in_their_threads", "loops/dropfolder.py", 'entry_id = delivery_id(box.state_id, task.id, task.run, "entry", item.key)', 'entry_id = delivery_id(box.state_id, task.id, task.run, "entry", f"{item.key}{attempt}")'),
    _switch(56, "outbox::a_retried_task_that_writes_the_same_reply_again_sends_it_once", "loops/dropfolder.py", 'entry_id = delivery_id(box.state_id, task.id, task.run, "entry", item.key)', 'entry_id = delivery_id(box.state_id, task.id, task.run, "entry", f"{item.key}{attempt}")'),
    _switch(57, "outbox::a_rejected_delivery_is_a_dead_letter_that_alerts_and_a_person_sends_again_with_its_id", "sinks/command.py", "if ended.exit_code == EXIT_REJECTED:", "if False:"),
    _switch(57, "sinks::routes_by_label_result_and_type_lead_to_three_sinks", "core/routing.py", "for item in have if item for pattern in patterns)", "for item in have if item and '=' not in item for pattern in patterns)"),
    _switch(58, "clocks::a_timeout_raised_in_the_config_lets_a_running_worker_live", "loops/supervision.py", "            self.refresh_clocks(task_id)\n", "            pass\n"),
    _switch(59, "clocks::a_worker_that_has_handed_in_its_result_and_stays_is_ended_after_a_grace", "loops/handover.py", "if RESULT_KEY in keys:", "if False:"),
    _switch(60, "outbox::every_kind_of_end_is_delivered", "loops/finishing.py", "    add_result(tx, box, moved, request, data)\n    return moved", "    return moved"),
    _switch(61, "outbox::retry_of_a_task_is_a_new_run_with_a_new_result_and_sends_no_delivered_entry_again", "core/envelope.py", '"" if kind == "entry" else str(run)', "str(run)"),
    _switch(62, "intents::a_conflict_is_refused_before_a_spawn_and_names_task_and_path", *NO_REFUSAL),
    _switch(63, "intents::a_conflict_by_file_is_a_finished_task_that_was_refused_and_its_id_is_free_again", *NO_REFUSAL),
    _switch(64, "intents::a_conflict_is_refused_before_a_spawn_and_names_task_and_path", "storage/intents.py", '"task": self.task, "path": self.other_path}', '"task": self.task}'),
    _switch(65, "intents::the_queue_policy_runs_them_one_by_one_in_order", *NO_ORDER),
    _switch(65, "intents::a_wide_claim_is_not_overtaken_by_narrow_ones_that_come_later", "storage/intents.py", "(*below(start), of.place)", "(*below(start), 0)", "storage/intents.py", "(folder, of.place)) for folder in at_or_above(start)", "(folder, of.place)) for folder in at_or_above(start)[:1]"),
    _switch(65, "intents::a_retry_claims_anew_and_meets_its_policy", "loops/operations.py", "    if reason is not None:\n", "    if False:\n"),
    _switch(65, "intents_real::no_two_workers_ever_held_one_file_unasked_whatever_was_killed", *NO_ORDER),
    _switch(66, "intents::the_warn_policy_admits_both_and_alerts_once", "loops/admission.py", "if met.decision is Decision.WARN:", "if False:"),
    _switch(67, "intents::the_policy_is_the_deployments_and_refuse_without_one", "core/settings.py", 'on_conflict: Conflict = "refuse"', 'on_conflict: Conflict = "warn"'),
    _switch(68, "intents::claims_and_conflicts_can_be_looked_at", "loops/admission.py", "    intents.claim(tx, seq, item.writes, item.on_conflict)\n", ""),
    _switch(69, "intents::every_kind_of_end_releases_its_claim", *NO_RELEASE),
    _switch(70, "intents::a_claim_past_its_ttl_beside_a_live_worker_alerts_and_is_kept claims::a_claim_in_backoff_is_released_by_its_ttl_and_made_again_before_the_next_attempt", "loops/claimwatch.py", "if expires <= self.box.clock.now_us():", "if False:"),
    _switch(71, "intents::a_claim_of_a_worker_that_dies_with_its_supervisor_comes_free", *NO_RELEASE),
    _switch(72, "intents::claims_survive_kills_of_the_daemon_while_they_are_made", "storage/intents.py", "    if paths:\n        place =", '    tx.execute("CREATE TEMP TABLE IF NOT EXISTS intents AS SELECT * FROM main.intents WHERE 0")\n    if paths:\n        place ='),
    _switch(73, "intents::claims_and_conflicts_can_be_looked_at", "loops/claiming.py", "    intents.record_conflicts(tx, task_id, name, met.strangers, met.policy)\n", ""),
    _switch(74, "intents::the_queue_policy_runs_them_one_by_one_in_order", *NO_ORDER),
    _switch(75, "claims::an_outside_claim_refuses_tasks_while_its_command_runs_and_exits_as_it_did claims::claims_and_tasks_wait_for_each_other_in_order", "storage/outsideclaims.py", "    intents.claim(tx, claim.in_line, paths, policy)\n", ""),
    _switch(76, "intents::of_fifty_claims_at_once_one_wins", "storage/intents.py", "            if seq in related:\n", "            if True:\n"),
    _switch(77, "intents::file_locks_are_neither_taken_nor_broken", "storage/intents.py", '    """All of a task\'s paths at once, at the end of the line. `paths`: (resolved, as given)."""\n', "    import os\n    for path, _ in paths:\n        os.rename(path, path + '~'); open(path, 'w').close()\n"),
    _switch(78, "intents::an_undeclared_write_is_not_stopped", "loops/admission.py", "if item.request.after is not None or item.writes or", "if not item.writes and tx.one('SELECT 1 FROM intents'):\n            return InvalidTask('declare what you write')\n        if item.request.after is not None or item.writes or"),
    _switch(79, "intents::aliases_of_a_path_conflict", "core/intents.py", 'or left.startswith(right.rstrip("/") + "/")', ""),
    _switch(79, "intents::aliases_of_a_path_conflict", "storage/paths.py", "os.path.realpath(plain)", "os.path.normpath(plain)"),
    _switch(80, "intents::a_conflict_is_refused_before_a_spawn_and_names_task_and_path", "loops/admission.py", '["kind"] == "socket"', '["kind"] == "nobody"'),
)  # fmt: skip


def node_ids(switch: Switch) -> list[str]:
    parts = [name.split("::") for name in switch.tests.split()]
    return [f"tests/mission/test_{module}.py::test_{name}" for module, name in parts]


@contextmanager
def broken_tree(switch: Switch) -> Iterator[Path]:
    """A copy of the tree with the switch thrown. Raises ValueError if a line to break is not there exactly once."""
    with tempfile.TemporaryDirectory(prefix="agentqd-switch-") as name:
        copy = Path(name)
        shutil.copytree(ROOT / "agentqd", copy / "agentqd")
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "tests" / "mission", copy / "tests" / "mission", ignore=ignored)
        shutil.copytree(ROOT / "tests" / "laptop", copy / "tests" / "laptop", ignore=ignored)
        for file in (
            "tests/conftest.py",
            "tests/budget.py",
            "tests/realbox.py",
            "tests/realsshd.py",
            "tests/smtpserver.py",
            "tests/smtpreceiver.py",
            "pyproject.toml",
        ):
            shutil.copy(ROOT / file, copy / file)
        for each in switch.breaks:
            path = copy / each.file
            text = path.read_text()
            if text.count(each.old) != 1:
                raise ValueError(
                    f"row {switch.row}: {each.file} has {text.count(each.old)} times: {each.old!r}"
                )
            path.write_text(text.replace(each.old, each.new))
            for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
                compiled.unlink()
        yield copy


def throw(switch: Switch) -> tuple[bool, str]:
    """(whether the row's tests noticed, what happened)."""
    try:
        with broken_tree(switch) as copy:
            env = {
                **os.environ,
                "PYTHONPATH": str(copy),
                "AGENTQD_TEST_WAIT_S": str(WAIT_S),
                "PYTHONDONTWRITEBYTECODE": "1",
            }
            env = {name: value for name, value in env.items() if not name.startswith("PYTEST_")}
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-x",
                "-q",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:randomly",
                *node_ids(switch),
            ]
            done = subprocess.run(
                command, cwd=copy, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False
            )
    except ValueError as error:
        return False, str(error)
    except subprocess.TimeoutExpired:
        return False, f"no end within {LIMIT_S} s"
    if done.returncode == FAILED:
        reason = next((line for line in done.stdout.splitlines() if line.startswith("E  ")), "failed")
        return True, reason.removeprefix("E").strip()[:100]
    return False, f"pytest ended with {done.returncode}: {done.stdout.strip().splitlines()[-1:]}"


def main(words: list[str]) -> int:
    rows = {int(word) for word in words}
    chosen = [switch for switch in SWITCHES if not rows or switch.row in rows]
    silent = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        began = time.monotonic()
        for switch, (noticed, what) in zip(chosen, pool.map(throw, chosen), strict=True):
            silent += not noticed
            print(
                f"row {switch.row:2}  {'noticed' if noticed else 'SILENT '}  {switch.breaks[0].file}  {what}",
                flush=True,
            )
    print(f"{len(chosen) - silent} of {len(chosen)} switches noticed, {time.monotonic() - began:.0f} s")
    return 1 if silent else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
