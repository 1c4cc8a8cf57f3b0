"""What the daemon and the supervisor say to each other: one JSON object a line over a Unix stream socket.

Invariants:
1. The daemon speaks first (`Hello`); the supervisor answers `Welcome` or `Refuse` and closes.
2. A `Hello` with a newer epoch cuts off every older connection, and what that one had sent but was not yet
   acted on is thrown away. An equal or older epoch than one already seen is refused.
3. `Run` is idempotent: an attempt already known (in memory, or by its `started` file) is never started again. One whose `End`
   has arrived with it is not started; that is answered (`NOT_STARTED`, with the `intent`), and nothing is remembered.
4. An ended attempt is kept (in memory and as `exit.json`) until `Forget`; it is told again at every `Welcome`.
5. A `Run` with `hold` starts nothing and lets nothing run: it is forgotten with its connection unless `Go` came.
6. Durations are seconds counted on the supervisor's own monotonic clock from the receipt of the message.
   `None` switches a clock off. Times are microseconds since the epoch (records only, never for timeouts).
"""

from __future__ import annotations

from typing import Final

import msgspec

PROTOCOL: Final = 1
NOT_STARTED: Final = (
    "not started: "  # how `Exited.error` begins where nothing was run and nothing is remembered
)
OTHER_INSTANCE: Final = (
    "started by another instance"  # ... and where `started` is another instance's, without exit.json
)
PROTOCOLS_SPOKEN: Final = (1,)  # by this daemon; a supervisor speaks exactly one


class Clocks(msgspec.Struct, frozen=True, omit_defaults=True):
    """The deadlines of one attempt. `run_s` counts from the worker's start, `total_s` from this message."""

    run_s: float | None = None
    total_s: float | None = None
    first_output_s: float | None = None
    silence_s: float | None = None
    kill_grace_s: float = 10.0
    warning_signal: int | None = None  # sent once, `kill_grace_s` before the deadline
    result_grace_s: float = 30.0


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    protocol: int
    epoch: int  # the daemon's; grows with every start
    state_id: str  # of the state folder: two daemons on two folders never share workers by mistake
    pid: int


class Run(msgspec.Struct, frozen=True, tag="run", omit_defaults=True):
    """Start one attempt. `folder` is tasks/ID/attempt-N, made here, all or nothing, by temporary name + rename."""

    task: str
    attempt: int
    folder: str
    argv: list[str]
    env: dict[str, str]  # complete; AGENTQ_* included
    clocks: Clocks
    cwd: str | None = None  # None: the attempt's own work/
    prompt: str | None = None  # written to folder/prompt; None: no prompt file
    stdin: str = "null"  # "prompt": the prompt file is the worker's stdin; "null": /dev/null
    stdout_bytes_max: int = 64 * 1024 * 1024  # the same for stderr
    hold: bool = False  # make the folder ready and wait for `Go`: the daemon's claim is not durable yet


class Go(msgspec.Struct, frozen=True, tag="go"):
    """The claim is durable: start what a `Run` with `hold` has made ready. Unknown: nothing is done."""

    task: str
    attempt: int


class SetClocks(msgspec.Struct, frozen=True, tag="set_clocks"):
    """New deadlines for a running attempt (config edit). `run_s` still counts from the worker's start."""

    task: str
    attempt: int
    clocks: Clocks


class End(msgspec.Struct, frozen=True, tag="end"):
    """End the attempt: SIGTERM, `kill_grace_s`, SIGKILL to the whole tree. `reason` comes back as `intent`."""

    task: str
    attempt: int
    reason: str  # cancelled, result_grace, shutdown, ...
    after_s: float = 0.0  # wait so long for a voluntary exit first


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """The journal has claimed this attempt's end; the supervisor need not keep it."""

    task: str
    attempt: int


class Exec(msgspec.Struct, frozen=True, tag="exec", omit_defaults=True):
    """Run a short foreign command for the daemon (a check, a command sink); nothing is kept on disk."""

    ref: str
    argv: list[str]
    env: dict[str, str]
    timeout_s: float
    cwd: str | None = None
    stdin: str | None = None  # text for stdin
    stdin_path: str | None = None  # or a file; neither: /dev/null
    output_bytes_max: int = 4096


class ExecCancel(msgspec.Struct, frozen=True, tag="exec_cancel"):
    ref: str


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """Exit once the last worker has gone (an upgrade). `stop_workers`: end them first."""

    stop_workers: bool = False


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    n: int


Request = Hello | Run | Go | SetClocks | End | Forget | Exec | ExecCancel | Leave | Ping


class Running(msgspec.Struct, frozen=True, tag="running"):
    """The worker's program runs (exec has succeeded). Sent on start, and in `Welcome` for those alive."""

    task: str
    attempt: int
    pid: int
    pid_start: int  # /proc/PID/stat field 22; pid + this + boot id is an identity
    started_at: int
    intent: str | None = None  # set: it is being ended, and why


class LeftBehind(msgspec.Struct, frozen=True):
    pid: int
    name: str


class Exited(msgspec.Struct, frozen=True, tag="exited", omit_defaults=True):
    """The attempt is over and its whole tree is gone. The same object is the content of exit.json."""

    task: str
    attempt: int
    instance: str
    boot_id: str
    pid: int | None = None  # None: nothing was ever spawned (`error` says why)
    started_at: int | None = None
    ended_at: int = 0
    exit_code: int | None = None
    signal: int | None = None
    intent: str | None = (
        None  # why WE ended it: run_timeout, total_timeout, first_output_timeout, silence_timeout, cancelled, result_grace, ...
    )
    error: str | None = None  # spawn failed: what and where
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    left_behind: list[LeftBehind] = []  # processes of a finished worker that we had to end
    user_cpu_s: float = 0.0
    system_cpu_s: float = 0.0
    max_rss_bytes: int = 0


class Ending(msgspec.Struct, frozen=True, tag="ending"):
    """The supervisor has begun to end the attempt (a deadline, or as asked)."""

    task: str
    attempt: int
    intent: str


class Stuck(msgspec.Struct, frozen=True, tag="stuck"):
    """SIGKILL was sent and processes are still there. Repeated once a minute while it lasts."""

    task: str
    attempt: int
    pids: list[int]


class ExecEnded(msgspec.Struct, frozen=True, tag="exec_ended", omit_defaults=True):
    ref: str
    exit_code: int | None = None
    signal: int | None = None
    timed_out: bool = False
    error: str | None = None  # could not be started
    output: str = ""  # stdout then stderr, the tail, decoded with replacement


class Survivor(msgspec.Struct, frozen=True):
    """A process of an attempt of an EARLIER supervisor instance that is being ended and is not gone yet."""

    task: str
    attempt: int
    pid: int


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    protocol: int
    version: str
    instance: str  # random, new at every start of the supervisor
    boot_id: str
    pid: int
    running: list[Running]
    exited: list[Exited]
    survivors: list[Survivor]


class SurvivorsGone(msgspec.Struct, frozen=True, tag="survivors_gone"):
    """No process of an earlier instance is left; what it ran and has no exit.json is lost."""


class Refuse(msgspec.Struct, frozen=True, tag="refuse"):
    code: str  # old_epoch, other_state_folder, protocol, not_permitted
    message: str


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    n: int


Report = Welcome | Refuse | Running | Exited | Ending | Stuck | ExecEnded | SurvivorsGone | Pong

_encoder = msgspec.json.Encoder()
_request_decoder: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_report_decoder: msgspec.json.Decoder[Report] = msgspec.json.Decoder(Report)


def encode(message: Request | Report) -> bytes:
    """One line, newline included."""
    return _encoder.encode(message) + b"\n"


def decode_request(line: bytes) -> Request:
    """Raises msgspec.DecodeError or ValidationError on anything that is not a request."""
    return _request_decoder.decode(line)


def decode_report(line: bytes) -> Report:
    """Raises msgspec.DecodeError or ValidationError on anything that is not a report."""
    return _report_decoder.decode(line)
