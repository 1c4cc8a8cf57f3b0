"""A stand-in for the daemon: docs/api.md over a real Unix socket, with answers that a test can bend."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

NOW = "2026-04-07T18:30:00.000Z"
LATER = "2026-04-07T18:30:04.250Z"


def a_task(task_id: str = "t1", **changes: Any) -> dict[str, Any]:
    return {
        "id": task_id, "task": "fix the tests", "queue": "default", "runner": "shell", "state": "finished", "result": "success",
        "reason": None, "detail": None, "run": 1, "priority": 0, "labels": [], "submitted_at": NOW, "accepted_at": NOW,
        "started_at": NOW, "finished_at": LATER, "waiting_for": None,
        "source": {"kind": "file", "file": "queue/tasks.jsonl", "offset": 4096, "length": 120}, "folder": f"/s/tasks/{task_id}",
        "attempts": [{
            "attempt": 1, "run": 1, "pid": 4242, "started_at": NOW, "ended_at": LATER, "exit_code": 0, "signal": None,
            "result": "success", "reason": None, "folder": f"/s/tasks/{task_id}/attempt-1", "duration_s": 4.25,
            "stdout_bytes": 2048, "stderr_bytes": 0, "deadline_at": None, "left_behind": [],
        }],
        "outbox": [a_row(task_id=task_id)],
        "events": [
            {"seq": 7, "at": NOW, "event": "accepted", "data": {"state": "queued"}},
            {"seq": 8, "at": NOW, "event": "claimed", "data": {"attempt": 1}},
            {"seq": 9, "at": LATER, "event": "finished", "data": {"result": "success", "exit_code": 0}},
        ],
        "settings": {"run_timeout_s": 3600.0},
        **changes,
    }  # fmt: skip


def a_row(delivery_id: str = "d1f0c2", **changes: Any) -> dict[str, Any]:
    return {
        "delivery_id": delivery_id, "type": "agentq.task.success", "task_id": "t1", "name": "fix the tests", "key": None,
        "sink": "completions", "state": "delivered", "attempts": 1, "created_at": LATER, "next_try_at": None,
        "delivered_at": LATER, "last_error": None, "bytes": 900, **changes,
    }  # fmt: skip


def a_sink(name: str = "hook", **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "type": "webhook", "in_config": True, "pending": 3, "held": 0, "dead": 1, "delivered": 205,
        "oldest_pending_s": 840.0, "breaker": "closed", "next_probe_at": None, "left_alone_until": None, "disabled": None, "disabled_by": None,
        "disabled_at": None, "concurrency": 5, "concurrency_max": 20, "in_flight": 1, "rate": None, "rate_wait_s": 0.0,
        "rate_limited": False, "last_error": None,
        "backlog": {"pending": 1, "delivering": 1, "retryable": 1, "held": 0, "delivered": 205, "dead": 1, "dropped": 0},
        "delivered_last": {"1m": 4, "5m": 20, "1h": 205}, "failed_last": {"1m": 1, "5m": 1, "1h": 2}, "counted_since": NOW,
        **changes,
    }  # fmt: skip


def a_status(**changes: Any) -> dict[str, Any]:
    return {
        "box": "box1",
        "daemon": {"pid": 100, "version": "0.1.0", "uptime_s": 7384.2, "epoch": 3, "rss_bytes": 41_000_000, "draining": False, "draining_since": None,
                   "state_dir": "/var/lib/agentqd", "config": None},
        "supervisor": {"pid": 101, "version": "0.1.0", "instance": "abc", "connected": True, "workers": 1},
        "tasks": {"running": 1, "queued": 3, "finished": 210},
        "results": {"success": 200, "failed": 9, "timeout": 1},
        "queues": {"default": {"running": 1, "waiting": 3, "concurrency": 4, "paused": False, "oldest_waiting_s": 61.0},
                   "slow": {"running": 0, "waiting": 0, "concurrency": 1, "paused": True, "oldest_waiting_s": None}},
        "outbox": {"delivered": 415, "pending": 3, "dead": 1},
        "sinks": {"completions": {"type": "completions", "pending": 0, "dead": 0, "delivered": 210, "oldest_pending_s": None,
                                  "breaker": "closed", "last_error": None},
                  "hook": {"type": "webhook", "pending": 3, "dead": 1, "delivered": 205, "oldest_pending_s": 840.0,
                           "breaker": "open", "last_error": "connect to https://example.org/hook: connection refused"}},
        "alerts": [{"at": NOW, "type": "agentq.alert.no_work", "task_id": "t9", "message": "exit 0 and nothing to show",
                    "count": 2, "delivery_id": "d9"}],
        "attention": [
            {"level": "warning", "text": "queue slow is paused", "fix": "agentqctl resume slow"},
            {"level": "error", "text": "1 delivery is dead: hook: connect to https://example.org/hook: connection refused",
             "fix": "agentqctl outbox list --sink hook --state dead"},
        ],
        "running": [{"id": "06f3h8v2k1abcdefghjk", "task": "rewrite the parser so that it reads everything in one pass", "pid": 4242,
                     "attempt": 1, "started_at": NOW, "running_s": 125.0, "deadline_in_s": 3475.0, "queue": "default"}],
        "intake": {"offset": 90210, "bytes_waiting": 0, "rejected": 2, "last_line_at": NOW},
        "disk": {"free_bytes": 5_000_000_000, "intake_stopped": False},
        **changes,
    }  # fmt: skip


def error(status: int, code: str, message: str = "no", **fields: Any) -> web.Response:
    return web.json_response({"error": code, "message": message, **fields}, status=status)


class StandIn:
    """`answers[(method, path)]`: a function of the request instead of the stand-in's own. `seen`: every request."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.seen: list[tuple[str, str, dict[str, str], Any]] = []
        self.answers: dict[tuple[str, str], Handler] = {}
        self.tasks: dict[str, dict[str, Any]] = {}
        self.rows: list[dict[str, Any]] = []
        self.sinks: list[dict[str, Any]] = [a_sink()]
        self.outcome = "delivered"
        self.retry_after_s: float | None = None
        self.completions: list[dict[str, Any]] = []
        self.acknowledged: dict[str, int] = {}
        self.output: dict[int, bytes] = {}
        self.status = a_status()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> StandIn:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def stop(self) -> None:
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def requests(self, method: str, path: str) -> list[tuple[dict[str, str], Any]]:
        return [(query, body) for seen, where, query, body in self.seen if (seen, where) == (method, path)]

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_route("*", "/{tail:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        self._loop.run_until_complete(web.UnixSite(runner, self.path).start())
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()
        if os.path.exists(self.path):
            os.unlink(self.path)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        body = json.loads(raw) if raw else None
        self.seen.append((request.method, request.path, dict(request.query), body))
        bent = self.answers.get((request.method, request.path))
        if bent is not None:
            return await bent(request)
        parts = request.path.removeprefix("/v1/").split("/")
        handler = getattr(self, f"_{request.method.lower()}_{parts[0]}", None)
        if handler is None:
            return error(404, "not_found")
        answer: web.StreamResponse = handler(request, parts[1:], body)
        return answer

    def _get_status(self, request: web.Request, rest: list[str], body: Any) -> web.Response:
        return web.json_response(self.status)

    def _post_tasks(self, request: web.Request, rest: list[str], body: Any) -> web.Response:
        if not rest:
            known = self.tasks.get(body["id"])
            self.tasks.setdefault(
                body["id"], a_task(body["id"], task=body["task"], state="queued", result=None)
            )
            answer = {
                "task_id": body["id"],
                "state": "queued",
                "result": None,
                "duplicate": known is not None,
                "where": "accepted",
            }
            return web.json_response(answer, status=200 if known else 201)
        task = self.tasks.get(rest[0])
        if task is None:
            return error(404, "no_such_task", f"no task {rest[0]}")
        if rest[1] != "retry" and task["state"] == "finished":
            return error(409, "illegal_transition", "it is finished", state="finished", result=task["result"])
        task["state"] = {"cancel": "stopping", "hold": "held", "release": "queued", "retry": "queued"}[
            rest[1]
        ]
        return web.json_response({"id": rest[0], "state": task["state"], "result": None})

    def _get_tasks(self, request: web.Request, rest: list[str], body: Any) -> web.Response:
        if not rest:
            first = int(request.query.get("before", 0))
            limit = int(request.query.get("limit", 100))
            found = list(self.tasks.values())[first : first + limit]
            more = first + limit < len(self.tasks)
            return web.json_response({"tasks": found, "next_before": first + limit if more else None})
        task = self.tasks.get(rest[0])
        if task is None:
            return error(404, "no_such_task", f"no task {rest[0]}")
        if rest[1:] == ["wait"]:
            last = task["attempts"][-1] if task["attempts"] else {}
            return web.json_response({
                "id": task["id"], "state": task["state"], "result": task["result"], "reason": task["reason"],
                "exit_code": last.get("exit_code"), "finished": task["state"] == "finished",
            })  # fmt: skip
        if rest[1:] == ["logs"]:
            attempt = int(request.query.get("attempt", max(self.output, default=1)))
            if attempt not in self.output:
                return error(404, "no_such_attempt")
            offset = int(request.query["offset"])
            data = self.output[attempt][offset : offset + 7]
            following = offset + len(data)
            headers = {
                "Agentq-Offset": str(offset),
                "Agentq-Next-Offset": str(following),
                "Agentq-Attempt": str(attempt),
            }
            if following == len(self.output[attempt]):
                headers["Agentq-End"] = "true"
            return web.Response(body=data, headers=headers, content_type="application/octet-stream")
        return web.json_response(task)

    def _get_outbox(self, request: web.Request, rest: list[str], body: Any) -> web.Response:
        if not rest:
            return web.json_response({"rows": self.rows, "next_before": None})
        row = {**self.rows[0], "tries": [{"at": NOW, "outcome": "deferred", "reason": "refused"}]}
        return web.json_response({
            "delivery_id": rest[0], "type": row["type"], "key": None, "task_id": "t1", "name": row["name"], "run": 1,
            "attempt": 1, "created_at": NOW, "bytes": 900, "sha256": "ab" * 32, "envelope": {"id": rest[0]}, "rows": [row],
        })  # fmt: skip

    def _post_outbox(self, request: web.Request, rest: list[str], body: Any) -> web.Response:
        count = (
            len(self.rows)
            if body.get("all")
            else sum(row["delivery_id"] in body["delivery_ids"] for row in self.rows)
        )
        if not count and "delivery_ids" in body:
            return error(404, "no_such_delivery", f"there is no delivery {body['delivery_ids'][0]!r}")
        if body.get("dry_run"):
            return web.json_response({"changed": 0, "would_change": count})
        return web.json_response({"changed": count, **({"kept": 1} if rest == ["move"] else {})})

    def _get_sinks(self, request: web.Request, rest: list[str], body: Any) -> web.Response:
        return web.json_response({"sinks": self.sinks})

    def _post_sinks(self, request: web.Request, rest: list[str], body: Any) -> web.Response:
        name, verb = rest
        if name not in {sink["name"] for sink in self.sinks}:
            return error(404, "no_such_sink", f"there is no sink {name}")
        if verb == "test":
            return web.json_response({
                "sink": name, "type": "webhook", "delivery_id": "d9", "outcome": self.outcome, "detail": "HTTP 200 \x1b[31m",
                "retry_after_s": self.retry_after_s, "took_s": 0.2,
            })  # fmt: skip
        return web.json_response({"sink": name, "disabled": verb == "disable", "changed": True})

    def _get_completions(self, request: web.Request, rest: list[str], body: Any) -> web.Response:
        consumer = request.query["consumer"]
        after = int(request.query.get("after", self.acknowledged.get(consumer, 0)))
        limit = int(request.query["limit"])
        rows = [row for row in self.completions if row["seq"] > after]
        answer = {
            "consumer": consumer,
            "acknowledged": self.acknowledged.get(consumer, 0),
            "rows": rows[:limit],
            "more": len(rows) > limit,
        }
        return web.json_response(answer)

    def _post_consumers(self, request: web.Request, rest: list[str], body: Any) -> web.Response:
        self.acknowledged[rest[0]] = body["seq"]
        return web.json_response({"consumer": rest[0], "acknowledged": body["seq"]})

    def _post_queues(self, request: web.Request, rest: list[str], body: Any) -> web.Response:
        return web.json_response({"queue": rest[0], "paused": rest[1] == "pause"})

    def _post_drain(self, request: web.Request, rest: list[str], body: Any) -> web.Response:
        return web.json_response({"draining": body["on"], "since": None})

    def _post_reload(self, request: web.Request, rest: list[str], body: Any) -> web.Response:
        return web.json_response({"changed": True})

    def _get_writes(self, request: web.Request, rest: list[str], body: Any) -> web.Response:
        if rest == ["conflicts"]:
            pair = {
                "path": "/srv/repo",
                "task_id": "t2",
                "task": "b",
                "other_id": "t1",
                "other_task": "a",
                "policy": "refuse",
                "count": 3,
                "first_at": NOW,
                "last_at": NOW,
            }
            return web.json_response({"conflicts": [pair]})
        claim = {"path": "/srv/repo", "task_id": "t1", "task": "a", "state": "running", "since": NOW}
        return web.json_response({"claims": [claim]})

    def _get_audit(self, request: web.Request, rest: list[str], body: Any) -> web.Response:
        if rest == ["verify"]:
            return web.json_response(
                {"ok": True, "events": 9, "first_seq": 1, "last_seq": 9, "broken_at": None, "reason": None}
            )
        after, limit = int(request.query["after"]), int(request.query["limit"])
        events = [
            {"seq": seq, "at": NOW, "task_id": "t1", "event": "accepted", "data": {}, "hash": "00"}
            for seq in range(after + 1, 2501)
        ]
        return web.json_response({"events": events[:limit], "more": len(events) > limit})

    def _get_config(self, request: web.Request, rest: list[str], body: Any) -> web.Response:
        if rest == ["schema"]:
            return web.json_response({"type": "object"})
        return web.json_response(
            {"path": None, "applied_at": NOW, "sha256": "", "settings": {"max_workers": 4}, "error": None}
        )

    def _get_doctor(self, request: web.Request, rest: list[str], body: Any) -> web.Response:
        check = {
            "name": "canary",
            "ok": False,
            "level": "warning",
            "message": "no canary is set",
            "fix": "add canary.every to the config",
        }
        return web.json_response({"checks": [check]})


async def hang_up(request: web.Request) -> web.StreamResponse:
    """The connection dies before the answer."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


class SaysBytes:
    """Whatever connects gets these bytes, and then the end."""

    def __init__(self, path: str, data: bytes) -> None:
        self._data = data
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen(8)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            with peer:
                peer.settimeout(5)
                peer.recv(65536)
                try:
                    peer.sendall(self._data)
                    peer.shutdown(socket.SHUT_WR)
                except OSError:
                    continue

    def stop(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(10)
