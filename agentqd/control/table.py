"""Every route of the control socket, once: the server registers it, openapi.py describes it."""

from __future__ import annotations

from typing import Final

from agentqd.control import (
    audit,
    completions,
    config,
    doctor,
    events,
    logs,
    metrics,
    openapi,
    outbox,
    outboxchange,
    output,
    queues,
    sinks,
    status,
    submit,
    tasklist,
    tasks,
    waiting,
    writes,
)
from agentqd.control.route import Route

ROUTES: Final[tuple[Route, ...]] = (
    *status.ROUTES,
    *submit.ROUTES,
    *tasklist.ROUTES,
    *tasks.ROUTES,
    *waiting.ROUTES,
    *logs.ROUTES,
    *output.ROUTES,
    *outbox.ROUTES,
    *outboxchange.ROUTES,
    *sinks.ROUTES,
    *completions.ROUTES,
    *queues.ROUTES,
    *writes.ROUTES,
    *audit.ROUTES,
    *config.ROUTES,
    *doctor.ROUTES,
    *events.ROUTES,
    *openapi.ROUTES,
    *metrics.ROUTES,
)
