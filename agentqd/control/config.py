"""The config as it is applied, its schema, and reading it anew."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from aiohttp import web

from agentqd.control.route import Call, Route, answer, known_fields
from agentqd.core.units import format_time


async def show_config(call: Call) -> web.StreamResponse:
    from agentqd.core.config_schema import settings_as_json

    reload, settings = call.room.parts.reload, call.room.box.settings
    error = reload.last_error
    view: dict[str, Any] = {
        "path": call.room.config_path,
        "applied_at": format_time(reload.applied_at),
        "sha256": reload.sha256,
        "settings": settings_as_json(settings),
        "error": None if error is None else error.as_json(),
    }
    return answer(view)


async def show_schema(call: Call) -> web.StreamResponse:  # noqa: ARG001 - the schema depends on nothing that runs
    from agentqd.core.config_schema import config_schema

    return answer(config_schema())


async def reload_config(call: Call) -> web.StreamResponse:
    known_fields(await call.body(), ())
    # To its end even if whoever asked goes away: half of it would leave settings applied and not recorded.
    return answer({"changed": await asyncio.shield(call.room.parts.reload.now())})


ROUTES: Final = (
    Route(
        "GET",
        "/v1/config",
        "The settings that are applied; secrets and values of env are hidden.",
        show_config,
    ),
    Route("GET", "/v1/config/schema", "JSON schema of the config file.", show_schema),
    Route(
        "POST",
        "/v1/reload",
        "Read the config file again now.",
        reload_config,
        body={"type": "object"},
        more_statuses={422: "invalid_config"},
    ),
)
