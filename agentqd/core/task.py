"""A task as it is written: one JSON object, hostile until it has passed here.

Promises:
1. `read_task` returns a `TaskRequest` or raises `InvalidTask` whose message says what is wrong, names the field and,
   for an unknown field, the nearest known one. It never returns a half-checked task.
2. The fast path is one typed decode; the friendly message is worked out only after that has failed.
3. `read_written_task` is `read_task` for what comes from outside: there a key that stands twice is an error too. (What the
   journal holds was accepted once and is read as it was then.)
4. `content_digest` is equal for two writings of the same task (field order, `45m` or 2700) and never depends on
   `id`, `submitted_at` or the path of `prompt_ref`, but on the prompt's own bytes.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
import re
from typing import Any, Final

import msgspec

from agentqd.core import limits
from agentqd.core.doubled import DoubledKey, refuse_doubled_keys
from agentqd.core.errors import InvalidTask
from agentqd.core.settings import AfterPolicy, Conflict, OnLost
from agentqd.core.units import Backoff, Duration, Size, decode_unit, encode_unit, parse_time_us
from agentqd.core.wording import plain

TASK_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SIGNALS: Final = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGTERM", "SIGCONT", "SIGWINCH")


class ExpectFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A file that must be there at the end; relative to the worker's current folder."""

    path: str
    min_bytes: Size = Size(1)
    changed: bool = True  # changed by this run: a stale artifact is not success


class Expect(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    files: list[ExpectFile | str] = []
    stdout_min_bytes: Size | None = None
    min_duration: Duration | None = None
    check: list[str] | None = None
    allow_no_work: bool | None = None

    def file_list(self) -> list[ExpectFile]:
        return [ExpectFile(path=item) if isinstance(item, str) else item for item in self.files]


class TaskRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """The fields a task may have; None: not given (the config decides)."""

    task: str
    id: str | None = None
    submitted_at: str | None = None
    prompt: str | None = None
    prompt_ref: str | None = None
    command: list[str] | None = None
    runner: str | None = None
    queue: str | None = None
    priority: int | None = None
    labels: list[str] | None = None
    workdir: str | None = None
    env: dict[str, str] | None = None
    not_before: str | None = None
    expires_at: str | None = None
    after: list[str] | str | None = None
    after_policy: AfterPolicy | None = None
    run_timeout: Duration | None = None
    timeout: Duration | None = None
    total_timeout: Duration | None = None
    queue_timeout: Duration | None = None
    first_output_timeout: Duration | None = None
    silence_timeout: Duration | None = None
    kill_grace: Duration | None = None
    warning_signal: str | None = None
    result_grace: Duration | None = None
    max_attempts: int | None = None
    backoff: Backoff | None = None
    on_lost: OnLost | None = None
    writes_to: list[str] | None = None
    on_conflict: Conflict | None = None
    intent_ttl: Duration | None = None
    expect: Expect | None = None
    deliver_to: list[str] | str | None = None
    deliver_within: Duration | None = None
    dedup_ttl: Duration | None = None

    def after_list(self) -> list[str]:
        return [self.after] if isinstance(self.after, str) else list(self.after or ())

    def own_sinks(self) -> list[str] | None:
        """The sinks that it names; None: it says nothing."""
        return [self.deliver_to] if isinstance(self.deliver_to, str) else self.deliver_to


FIELD_NAMES: Final = tuple(TaskRequest.__struct_fields__)


_BELOW: Final = {  # what is written one object too high
    **{name: f"expect.files[].{name}" for name in ExpectFile.__struct_fields__},
    **{name: f"expect.{name}" for name in Expect.__struct_fields__},
}

_decoder: Final = msgspec.json.Decoder(TaskRequest, dec_hook=decode_unit)
_canonical: Final = msgspec.json.Encoder(order="sorted")


def read_task(raw: bytes) -> TaskRequest:
    """A checked task from one JSON object. Raises InvalidTask (code: what kind of wrong; `field` where one is to blame)."""
    try:
        task = _decoder.decode(raw)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise _explain(raw, error) from None
    check_task(task)
    return task


def task_from_fields(fields: dict[str, Any]) -> TaskRequest:
    """The same from an already decoded object (control socket)."""
    return read_task(msgspec.json.encode(fields))


def read_written_task(raw: bytes) -> TaskRequest:
    """`read_task`, and no key stands twice in any of its objects: which of the two was meant is not ours to guess."""
    task = read_task(raw)
    try:
        refuse_doubled_keys(raw)
    except DoubledKey as error:
        raise InvalidTask(str(error), code="duplicate_field", field=error.name) from None
    return task


def _explain(raw: bytes, error: Exception) -> InvalidTask:
    """The second, slow look: what a person needs to mend the line."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as bad:
        return InvalidTask(f"not UTF-8: byte {bad.start} is 0x{raw[bad.start]:02x}", code="invalid_utf8")
    if "\x00" in text:
        return InvalidTask(
            f"a NUL byte at offset {text.index(chr(0))}; a line is plain JSON text", code="invalid_json"
        )
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as bad:
        return InvalidTask(f"not JSON: {bad}"[:300], code="invalid_json")
    if not isinstance(value, dict):
        return InvalidTask(f"a task is one JSON object, not {_kind(value)}", code="invalid_json")
    for name in value:
        if name not in FIELD_NAMES:
            return unknown_field(str(name), FIELD_NAMES, elsewhere=_BELOW)
    if "task" not in value:
        return InvalidTask("the field task (its name) is missing", code="missing_field", field="task")
    message = str(error)
    where = re.search(r"at `\$\.?([^`]*)`", message)
    field = where[1] if where else None
    what = re.sub(r" - at `\$[^`]*`", "", message)
    if field and (unknown := re.search(r"contains unknown field `([^`]*)`", message)):
        if "files" in field:
            return unknown_field(unknown[1], ExpectFile.__struct_fields__, inside=field)
        return unknown_field(unknown[1], Expect.__struct_fields__, inside=field, elsewhere=_BELOW)
    shown = f"{field}: {plain(what, (field,), TaskRequest)}" if field else what
    return InvalidTask(
        shown[:400], code="invalid_field", field=(field or "").split(".")[0].split("[")[0] or None
    )


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def unknown_field(
    name: str, known: tuple[str, ...], inside: str | None = None, elsewhere: dict[str, str] | None = None
) -> InvalidTask:
    """`elsewhere`: fields of other objects of a task and where they stand; meant are they only if nothing `known` is nearer."""
    name = (
        name[:80].encode("utf-8", "backslashreplace").decode()
    )  # JSON can name what UTF-8 cannot (a lone surrogate)
    places = {**(elsewhere or {}), **{each: each for each in known}}
    near = [places[each] for each in difflib.get_close_matches(name, places, n=1, cutoff=0.5)]
    hint = f"; did you mean {near[0]}?" if near else f"; known fields: {', '.join(known)}"
    where = f" in {inside}" if inside else ""
    return InvalidTask(
        f"unknown field {name!r}{where}{hint}",
        code="unknown_field",
        field=name,
        nearest=near[0] if near else None,
    )


def _kind(value: object) -> str:
    names = {
        list: "a list",
        str: "a string",
        int: "a number",
        float: "a number",
        bool: "a boolean",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def _bad(field: str, message: str, code: str = "invalid_field") -> InvalidTask:
    return InvalidTask(f"{field}: {message}", code=code, field=field)


def check_task(task: TaskRequest) -> None:
    """The rules that types cannot say. Raises InvalidTask."""
    if not task.task.strip():
        raise _bad("task", "the name is empty")
    if len(task.task) > limits.TASK_NAME_CHARS_MAX:
        raise _bad("task", f"the name is longer than {limits.TASK_NAME_CHARS_MAX} characters")
    if not task.task.isprintable():
        raise _bad("task", "the name has control characters")
    if task.id is not None and not TASK_ID.fullmatch(task.id):
        raise _bad("id", f"an id is 1 to 64 of A-Z a-z 0-9 _ -, not {task.id[:80]!r}")
    if task.submitted_at is not None:
        _time("submitted_at", task.submitted_at)
    _check_work(task)
    if task.timeout is not None and task.run_timeout is not None and task.timeout != task.run_timeout:
        raise _bad("timeout", "is another name of run_timeout; give one of the two")
    _check_when(task)
    _check_numbers(task)
    _check_lists(task)


def _check_work(task: TaskRequest) -> None:
    if task.prompt is None and task.prompt_ref is None and task.command is None:
        raise InvalidTask(
            "nothing to do: give one of prompt, prompt_ref or command", code="missing_field", field="prompt"
        )
    if task.prompt is not None and task.prompt_ref is not None:
        raise _bad("prompt_ref", "give prompt or prompt_ref, not both")
    if task.prompt is not None and not task.prompt.strip():
        raise _bad(
            "prompt", "is empty or blank; an empty prompt is an error, not 'no work'", code="empty_prompt"
        )
    if task.prompt_ref is not None and (not task.prompt_ref.strip() or "\x00" in task.prompt_ref):
        raise _bad("prompt_ref", "is not a path")
    if task.command is not None:
        if not task.command or not task.command[0]:
            raise _bad("command", "is an argv list; its first item is the program")
        if any("\x00" in item for item in task.command):
            raise _bad("command", "has a NUL character, which no argument can carry")
        if len(task.command) > limits.ARGV_ITEMS_MAX or sum(map(len, task.command)) > limits.ARGV_BYTES_MAX:
            raise _bad("command", "is too long")
    if task.workdir is not None and (not task.workdir or "\x00" in task.workdir):
        raise _bad("workdir", "is not a path")
    for name, value in (task.env or {}).items():
        if not ENV_NAME.fullmatch(name):
            raise _bad("env", f"{name[:80]!r} is not a variable's name")
        if name.startswith("AGENTQ_"):
            raise _bad("env", f"{name} is set by agentqd itself")
        if "\x00" in value:
            raise _bad("env", f"the value of {name} has a NUL character")
    if task.env is not None and len(task.env) > limits.ENV_ITEMS_MAX:
        raise _bad("env", f"has more than {limits.ENV_ITEMS_MAX} variables")


def _check_when(task: TaskRequest) -> None:
    not_before = _time("not_before", task.not_before) if task.not_before is not None else None
    expires = _time("expires_at", task.expires_at) if task.expires_at is not None else None
    if not_before is not None and expires is not None and expires <= not_before:
        raise _bad("expires_at", "lies before not_before: the task could never run")
    for name in task.after_list():
        if not TASK_ID.fullmatch(name):
            raise _bad("after", f"{name[:80]!r} is not a task id")
    if task.id is not None and task.id in task.after_list():
        raise _bad("after", f"the task {task.id} cannot come after itself", code="dependency_cycle")
    if task.after_policy is not None and not task.after_list():
        raise _bad("after_policy", "says nothing without after")


def _time(field: str, value: str) -> int:
    try:
        return parse_time_us(value)
    except ValueError as error:
        raise _bad(field, str(error)) from None


def _check_numbers(task: TaskRequest) -> None:
    if task.priority is not None and abs(task.priority) > limits.PRIORITY_ABS_MAX:
        raise _bad("priority", f"lies between -{limits.PRIORITY_ABS_MAX} and {limits.PRIORITY_ABS_MAX}")
    if task.max_attempts is not None and not 1 <= task.max_attempts <= limits.MAX_ATTEMPTS_MAX:
        raise _bad("max_attempts", f"lies between 1 and {limits.MAX_ATTEMPTS_MAX}")
    for field in ("run_timeout", "timeout", "total_timeout", "first_output_timeout", "silence_timeout"):
        value = getattr(task, field)
        if value is not None and value < limits.DURATION_MIN_S:
            raise _bad(field, "must be more than zero; leave it out for the default")
    if task.warning_signal is not None and task.warning_signal not in SIGNALS:
        raise _bad("warning_signal", f"is one of {', '.join(SIGNALS)}")


def _check_lists(task: TaskRequest) -> None:
    bounded: tuple[tuple[str, list[str] | None, int], ...] = (
        ("labels", task.labels, limits.LABELS_MAX),
        ("after", task.after_list(), limits.AFTER_MAX),
        ("writes_to", task.writes_to, limits.WRITES_TO_MAX),
        ("deliver_to", task.own_sinks(), limits.DELIVER_TO_MAX),
    )
    for field, items, most in bounded:
        if items is not None and len(items) > most:
            raise _bad(field, f"has more than {most} items")
        if items is not None and any(not item or "\x00" in item for item in items):
            raise _bad(field, "has an empty item or a NUL character")
    for label in task.labels or ():
        if len(label) > limits.LABEL_CHARS_MAX or not label.isprintable():
            raise _bad("labels", f"a label is at most {limits.LABEL_CHARS_MAX} printable characters")
    if task.expect is not None:
        if len(task.expect.files) > limits.EXPECT_FILES_MAX:
            raise _bad("expect", f"names more than {limits.EXPECT_FILES_MAX} files")
        if any(not item.path or "\x00" in item.path for item in task.expect.file_list()):
            raise _bad("expect", "files: a path is empty or has a NUL character")
        if task.expect.check is not None and (not task.expect.check or not task.expect.check[0]):
            raise _bad("expect", "check is an argv list; its first item is the program")


def prompt_digest(prompt: bytes) -> str:
    return hashlib.sha256(prompt).hexdigest()


def content_digest(task: TaskRequest, prompt_sha256: str | None) -> bytes:
    """What makes two tasks with one id the same task (design: dedup). `prompt_sha256` for a prompt_ref's file."""
    fields = msgspec.to_builtins(task, enc_hook=encode_unit)
    for name in ("id", "submitted_at", "prompt_ref"):
        fields.pop(name, None)
    if isinstance(task.deliver_to, str):
        fields["deliver_to"] = [task.deliver_to]
    if "timeout" in fields:
        fields["run_timeout"] = fields.pop("timeout")
    prompt = fields.pop("prompt", None)
    if prompt is not None:
        prompt_sha256 = prompt_digest(prompt.encode("utf-8", "surrogatepass"))
    if prompt_sha256 is not None:
        fields["prompt_sha256"] = prompt_sha256
    return hashlib.sha256(_canonical.encode(fields)).digest()


def derived_id(*parts: bytes) -> str:
    """A stable id from what identifies a line: 20 characters, lower case, as `agentqctl` makes them at random."""
    digest = hashlib.sha256(b"\x00".join(parts)).digest()
    return "t" + base64.b32encode(digest).decode("ascii")[:19].lower()
