"""Lists longer than one answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentqd.client.connection import Connection, take
from agentqd.core.limits import LIST_ROWS_MAX

PAGE_ROWS = 1000


def collect(
    connection: Connection, path: str, field: str, query: Mapping[str, str | None], limit: int | None
) -> tuple[list[dict[str, Any]], bool]:
    """Up to `limit` rows (None: all), page by page, and whether there are more."""
    found: list[dict[str, Any]] = []
    before: int | str | None = None
    page_rows = min(PAGE_ROWS, LIST_ROWS_MAX)
    while True:
        most = page_rows if limit is None else min(page_rows, limit - len(found))
        answer = connection.get(path, query={**query, "limit": most, "before": before})
        rows: list[dict[str, Any]] = take(answer, field, list)
        found += rows
        before = answer.get("next_before")
        if before is None or not rows:
            return found, False
        if limit is not None and len(found) >= limit:
            return found[:limit], True
