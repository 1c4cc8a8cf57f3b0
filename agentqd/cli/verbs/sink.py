"""`agentqctl sink`: where deliveries go, whether they arrive, and a person's word about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from agentqd.cli.output import Cell, Column, Row
from agentqd.cli.text import duration, local_time
from agentqd.cli.verb import Call, Family, verb
from agentqd.client.connection import take
from agentqd.core.errors import EXIT_OTHER, EXIT_REFUSED_FOR_NOW

TEST_EXTRA_S = 120.0  # a test waits for its receiver
WAITING = ("pending", "delivering", "retryable")
WINDOWS = ("1m", "5m", "1h")
COLUMNS = (
    Column("SINK", flex=True),
    Column("TYPE", drop=7),
    Column("STATE", flex=True),
    Column("WAITING", right=True),
    Column("HELD", right=True, drop=4),
    Column("DEAD", right=True, drop=3),
    Column("OLDEST", right=True, drop=2),
    Column("1m/5m/1h", right=True, drop=6),
    Column("FAILED", right=True, drop=5),
    Column("AT ONCE", right=True, drop=8),
    Column("LAST ERROR", flex=True, drop=1),
)

command = Family("sink", default="list", help="Where deliveries go, and whether they arrive.")


def _sink_verb(name: str) -> Callable[[Callable[..., Any]], click.Command]:
    def register(function: Callable[..., Any]) -> click.Command:
        made = verb(name)(function)
        command.add_command(made)
        return made

    return register


@_sink_verb("list")
def list_sinks(call: Call) -> int:
    """All sinks, also those no longer in the config that have rows to send, held or dead. Rates are tries since the daemon started
    or the sink was edited: delivered (and FAILED) in the last minute, five minutes, hour. AT ONCE: sends now, of so many as its
    pace allows now (at most ever)."""
    sinks = take(call.box.connection.get("sinks"), "sinks", list)
    if call.as_json:
        call.out.json(sinks)
        return 0
    call.out.rows(COLUMNS, [_row(sink) for sink in sinks if isinstance(sink, dict)], empty="no sinks")
    return 0


def _row(sink: dict[str, Any]) -> Row:
    backlog = sink.get("backlog") or {}
    dead, held = backlog.get("dead", 0), backlog.get("held", 0)
    return [
        str(sink.get("name")),
        str(sink.get("type") or ""),
        sink_state(sink),
        str(sum(backlog.get(state, 0) for state in WAITING)),
        Cell(str(held), "warn" if held else ""),
        Cell(str(dead), "bad" if dead else ""),
        duration(sink.get("oldest_pending_s")),
        _rates(sink.get("delivered_last")),
        _rates(sink.get("failed_last")),
        f"{sink['in_flight']} of {sink.get('concurrency')} ({sink.get('concurrency_max')})"
        if "in_flight" in sink
        else "",
        str(sink.get("last_error") or ""),
    ]


def _rates(counts: Any) -> str:
    return "/".join(str(counts.get(name, 0)) for name in WINDOWS) if isinstance(counts, dict) else ""


def sink_state(sink: dict[str, Any]) -> Cell:
    """In words: what keeps it from sending, or that nothing does."""
    breaker = str(sink.get("breaker") or "closed")
    if breaker == "disabled":
        between = (
            " " if sink.get("disabled_by") == "person" else ": "
        )  # "by a person ...", or what the receiver said
        return Cell(f"disabled{between}{sink['disabled']}" if sink.get("disabled") else "disabled", "warn")
    if sink.get("in_config") is False:
        return Cell("not in the config", "warn")
    if breaker == "open":
        at = sink.get("next_probe_at")
        return Cell(f"resting until {local_time(at)}" if at else "resting", "warn")
    if sink.get("left_alone_until"):
        return Cell(f"asked to be left alone until {local_time(sink['left_alone_until'])}", "warn")
    if breaker == "half_open":
        return Cell("probing", "warn")
    if sink.get("rate_limited"):
        return Cell(f"rate-limited ({sink.get('rate')})", "busy")
    return Cell(f"ok, at most {sink['rate']}" if sink.get("rate") else "ok", "good")


@_sink_verb("test")
@click.argument("name", metavar="SINK")
def test(call: Call, name: str) -> int:
    """Send a test entry (type agentq.test) right now, past breaker and backlog, also to a disabled sink. No row is left of it.
    Exit 0: delivered; 75: later; 1: refused."""
    answer = call.box.connection.post("sinks", name, "test", extra_s=TEST_EXTRA_S)
    outcome = str(answer.get("outcome"))
    if call.as_json:
        call.out.json(answer)
    else:
        style = {"delivered": "good", "deferred": "warn"}.get(outcome, "bad")
        said = f": {answer['detail']}" if answer.get("detail") else ""
        if answer.get("retry_after_s"):
            said += f" (it asks to be left alone for {duration(answer['retry_after_s'])})"
        if outcome == "disabled":
            said += " (a real delivery would disable the sink)"
        word = "refused" if outcome == "disabled" else outcome
        call.out.lines(f"{word} in {duration(answer.get('took_s'))}{said}", style, hang="  ")
        call.out.lines(f"{answer.get('delivery_id')} (agentq.test) to {name}", "dim")
    return {"delivered": 0, "deferred": EXIT_REFUSED_FOR_NOW}.get(outcome, EXIT_OTHER)


@_sink_verb("disable")
@click.argument("name", metavar="SINK")
@click.option("--reason", metavar="TEXT", help="Why, for whoever looks.")
def disable(call: Call, name: str, reason: str | None) -> int:
    """Send nothing to it until `enable`, over restarts and edits of the config. Its rows are held."""
    return _say(
        call, call.box.connection.post("sinks", name, "disable", body={"reason": reason} if reason else None)
    )


@_sink_verb("enable")
@click.argument("name", metavar="SINK")
def enable(call: Call, name: str) -> int:
    """Send to it again, whoever has disabled it. What was held because of that goes on; what a person holds stays held."""
    return _say(call, call.box.connection.post("sinks", name, "enable"))


def _say(call: Call, answer: dict[str, Any]) -> int:
    if call.as_json:
        call.out.json(answer)
        return 0
    what = "disabled" if answer.get("disabled") else "enabled"
    released = answer.get("releasing")
    rows = f", {released} held row{'' if released == 1 else 's'} being released" if released else ""
    before = "" if answer.get("changed") else " (it was so before)"
    call.out.line(f"{answer.get('sink')}  {what}{before}{rows}")
    return 0
