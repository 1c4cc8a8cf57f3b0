"""Who claims to write where, what stomped on what, and claims from outside of any task."""

from __future__ import annotations

import asyncio
import os
import pwd
import re
import secrets
import sqlite3
from typing import Any, Final

from aiohttp import web

from agentqd.control import queries
from agentqd.control.room import Room
from agentqd.control.route import Call, Param, Route, answer, is_text, known_fields
from agentqd.core.errors import AgentqError, InvalidRequest, NotPermitted, RefusedForNow
from agentqd.core.limits import (
    CLAIM_PATH_BYTES_MAX,
    LIST_ROWS_MAX,
    TASK_NAME_CHARS_MAX,
    WRITES_TO_MAX,
)
from agentqd.core.settings import Conflict as Policy
from agentqd.core.units import format_time, parse_time_us
from agentqd.loops import outside
from agentqd.loops.claimwatch import Holder as TaskHolder
from agentqd.loops.claimwatch import holder_of, sign_of
from agentqd.loops.outside import NoSuchClaim, Wish
from agentqd.storage import outsideclaims
from agentqd.storage import tasks as store
from agentqd.storage.outsideclaims import Holder, OutsideClaim
from agentqd.storage.paths import resolve_intents
from agentqd.supervisor.procfs import read_process
from agentqd.system.peercred import peer_of

US: Final = 1_000_000
WAIT_MAX_S: Final = 3600
_LOOK_AGAIN_S: Final = 5.0
_ID: Final = re.compile(r"claim-[A-Za-z0-9_-]{8,58}", re.ASCII)
_POLICIES: Final[tuple[Policy, ...]] = ("refuse", "queue", "warn")
_ASK_FIELDS: Final = ("paths", "on_conflict", "name", "id", "pid")


# What is claimed.


async def list_claims(call: Call) -> web.StreamResponse:
    room = call.room

    def query(connection: sqlite3.Connection) -> tuple[list[dict[str, Any]], dict[int, TaskHolder]]:
        claims, holders = [], {}
        for seq, path, given, policy, since, task_id, name, state, reason in connection.execute(
            queries.CLAIMS, (LIST_ROWS_MAX,)
        ).fetchall():
            waits = (state, reason) == ("blocked", "write_conflict")
            claims.append(
                {
                    "path": path,
                    "given": given,
                    "policy": policy,
                    "since": format_time(since),
                    "expires_at": None,
                    "task_id": task_id,
                    "task": name,
                    "state": state,
                    "kind": "task",
                    "waiting": waits,
                    "seq": seq,
                }
            )
            if seq not in holders and not waits:
                holder = holder_of(connection, room.box, store.get(connection, seq))
                if holder is not None:
                    holders[seq] = holder
        return claims + _outside(connection), holders

    claims, holders = await room.box.journal.read(query)
    expires = await asyncio.to_thread(
        lambda: {
            seq: sign + int(each.ttl_s * US)
            for seq, each in holders.items()
            if (sign := sign_of(room.box, each)) is not None
        }
    )
    for claim in claims:
        claim["expires_at"] = format_time(expires.get(claim.pop("seq", 0)))
    return answer({"claims": sorted(claims, key=lambda claim: claim["path"])[:LIST_ROWS_MAX]})


def _outside(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    return [
        {
            "path": path,
            "given": given,
            "policy": claim.policy,
            "since": format_time(claim.asked_at),
            "expires_at": None,
            "task_id": claim.id,
            "task": claim.name,
            "state": "held" if claim.held else "waiting",
            "kind": "outside",
            "waiting": not claim.held,
            "pid": claim.holder.pid,
            "user": claim.holder.user,
        }
        for claim in outsideclaims.all_claims(connection)
        for path, given in outsideclaims.paths_of(connection, claim)
    ]


async def list_conflicts(call: Call) -> web.StreamResponse:
    since = _since(call.query["since"])

    def query(connection: sqlite3.Connection) -> list[dict[str, Any]]:
        return [
            {
                "path": path,
                "task_id": task_id,
                "task": name,
                "other_id": other_id,
                "other_task": other_name,
                "policy": policy,
                "count": count,
                "first_at": format_time(first),
                "last_at": format_time(last),
            }
            for path, task_id, name, other_id, other_name, policy, count, first, last in connection.execute(
                queries.CONFLICTS, (LIST_ROWS_MAX, since)
            )
        ]

    return answer({"conflicts": await call.room.box.journal.read(query)})


def _since(text: str | None) -> int:
    if text is None:
        return 0
    try:
        return parse_time_us(text)
    except ValueError as error:
        raise InvalidRequest(f"since: {error}", field="since") from None


# Claims from outside.


async def ask(call: Call) -> web.StreamResponse:
    room = call.room
    wish = await _wish(call)
    if room.box.disk_low:
        raise RefusedForNow(
            "the disk of this box is nearly full: nothing new is taken until there is space",
            reason="disk_low",
        )
    outcome = await room.box.journal.commit(lambda tx: outside.ask(tx, room.box, wish))
    if isinstance(outcome, AgentqError):
        raise outcome
    room.parts.outside.watch()
    return answer(_view(outcome.claim, [each.as_json() for each in outcome.conflicts]), 201)


async def _wish(call: Call) -> Wish:
    """Raises InvalidRequest, NotPermitted."""
    body = await call.body()
    known_fields(body, _ASK_FIELDS)
    policy = body.get("on_conflict", call.room.box.settings.writes.on_conflict)
    if policy not in _POLICIES:
        raise InvalidRequest(f"on_conflict is one of {', '.join(_POLICIES)}", field="on_conflict")
    claim_id = body.get("id", f"claim-{secrets.token_hex(8)}")
    if not isinstance(claim_id, str) or not _ID.fullmatch(claim_id):
        raise InvalidRequest("id is claim- and 8 to 58 of A-Z a-z 0-9 _ -", field="id")
    paths = _paths(body.get("paths"))
    holder = await asyncio.to_thread(_holder, call, body.get("pid"))
    name = body.get("name", f"pid {holder.pid}")
    if not isinstance(name, str) or not name.strip() or len(name) > TASK_NAME_CHARS_MAX or not is_text(name):
        raise InvalidRequest(f"name is a text of 1 to {TASK_NAME_CHARS_MAX} characters", field="name")
    resolved = await asyncio.to_thread(resolve_intents, paths, None)
    return Wish(claim_id, name, holder, policy, resolved)


def _paths(value: Any) -> list[str]:
    if not isinstance(value, list) or not 0 < len(value) <= WRITES_TO_MAX:
        raise InvalidRequest(f"paths is a list of 1 to {WRITES_TO_MAX} absolute paths", field="paths")
    for path in value:
        if not isinstance(path, str) or not path.startswith("/") or not is_text(path):
            raise InvalidRequest(f"paths: {str(path)[:80]!r} is no absolute path (/...)", field="paths")
        if len(path.encode()) > CLAIM_PATH_BYTES_MAX:
            raise InvalidRequest(f"paths: one is longer than {CLAIM_PATH_BYTES_MAX} bytes", field="paths")
    return value


def _holder(call: Call, pid: Any) -> Holder:
    """The process that connected, or one of the same user that it names. Blocking (/proc, NSS)."""
    transport = call.request.transport
    sock = None if transport is None else transport.get_extra_info("socket")
    if transport is None or sock is None:
        raise ConnectionResetError("the peer has gone")
    peer = peer_of(sock)
    if pid is not None and (not isinstance(pid, int) or isinstance(pid, bool) or not 0 < pid < 2**31):
        raise InvalidRequest("pid is the number of a process", field="pid")
    wanted = peer.pid if pid is None else pid
    process = read_process(wanted) if wanted else None
    if process is None or process.state in "ZX":
        text = f"agentqd cannot see the process {wanted}: it has ended, or lives where agentqd cannot look (another container)"
        raise InvalidRequest(text, field="pid")
    if pid is not None and pid != peer.pid and peer.uid not in (0, _owner(wanted)):
        raise NotPermitted(f"process {wanted} belongs to another user", pid=wanted)
    if transport.is_closing():  # its number may be another's by now
        raise ConnectionResetError("the peer has gone")
    try:
        user = pwd.getpwuid(peer.uid).pw_name
    except KeyError:
        user = str(peer.uid)
    return Holder(peer.uid, user, process.pid, process.start, call.room.parts.outside.boot_id)


def _owner(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def _view(claim: OutsideClaim, conflicts: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "claim_id": claim.id,
        "name": claim.name,
        "state": "held" if claim.held else "waiting",
        "policy": claim.policy,
        "pid": claim.holder.pid,
        "user": claim.holder.user,
        "since": format_time(claim.asked_at),
        "held_at": format_time(claim.held_at),
        "conflicts": conflicts,
    }


async def wait_for_claim(call: Call) -> web.StreamResponse:
    """A long poll until a waiting claim is held."""
    room, claim_id = call.room, call.part("id")
    deadline = room.deadline(call.query["timeout_s"])
    with room.watch.of(claim_id) as changed:
        while True:
            claim = (
                await room.box.journal.read(lambda c: outsideclaims.find(c, claim_id))
                if _ID.fullmatch(claim_id)
                else None
            )
            if claim is None:
                raise _no_such_claim(claim_id)
            left_s = room.left_s(deadline)
            if claim.held or left_s <= 0:
                return answer(_view(claim, [] if claim.held else await _waits_for(room, claim)))
            await room.wait_for(changed, min(left_s, _LOOK_AGAIN_S))


async def _waits_for(room: Room, claim: OutsideClaim) -> list[dict[str, str]]:
    def query(connection: sqlite3.Connection) -> list[dict[str, str]]:
        return [each.as_json() for each in outside.waits_for(connection, claim)]

    return await room.box.journal.read(query)


async def release(call: Call) -> web.StreamResponse:
    known_fields(await call.body(), ())
    room, claim_id = call.room, call.part("id")
    gone = is_text(claim_id) and await room.box.journal.commit(
        lambda tx: outside.release(tx, room.box, claim_id, "released")
    )
    if not gone:
        raise _no_such_claim(claim_id)
    room.parts.outside.watch()
    return answer({"claim_id": claim_id, "state": "released"})


def _no_such_claim(claim_id: str) -> NoSuchClaim:
    return NoSuchClaim(f"there is no claim {claim_id[:80]!r} (any more)", id=claim_id[:80])


_ASK_BODY: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["paths"],
    "properties": {
        "paths": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": WRITES_TO_MAX},
        "on_conflict": {"enum": list(_POLICIES)},
        "name": {"type": "string", "maxLength": TASK_NAME_CHARS_MAX},
        "id": {"type": "string", "pattern": "^claim-[A-Za-z0-9_-]{8,58}$"},
        "pid": {
            "type": "integer",
            "description": "hold it for this process of the same user; default: who connects",
        },
    },
}
_MISSING: Final = {404: "no_such_claim"}
ROUTES: Final = (
    Route("GET", "/v1/writes", "Write claims, of tasks and from outside, held and waiting.", list_claims),
    Route(
        "GET",
        "/v1/writes/conflicts",
        "Write conflicts seen, by pair, with counts; of the newest 10,000.",
        list_conflicts,
        query=(Param("since", "only those since this time (RFC 3339)"),),
    ),
    Route(
        "POST",
        "/v1/writes/claims",
        "Claim paths for as long as a process lives. The same id again from the same process is the same claim.",
        ask,
        body=_ASK_BODY,
        status=201,
        more_statuses={409: "write_conflict, illegal_transition", 503: "refused_for_now"},
    ),
    Route(
        "GET",
        "/v1/writes/claims/{id}",
        "Answers when the claim is held or the time is over.",
        wait_for_claim,
        query=(Param("timeout_s", "wait so long at most", "number", 0.0, 0, WAIT_MAX_S),),
        more_statuses=_MISSING,
    ),
    Route(
        "POST",
        "/v1/writes/claims/{id}/release",
        "Let a claim go before its process ends.",
        release,
        body={"type": "object"},
        more_statuses=_MISSING,
    ),
)
