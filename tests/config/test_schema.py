"""The schema and the shown settings."""

from __future__ import annotations

import json
import re
from pathlib import Path

from msgspec import inspect

from agentqd.core.config_schema import config_schema, settings_as_json
from agentqd.core.settings import Runner, Settings, Sink

SHIPPED = Path(__file__).parents[2] / "config" / "agentqd.yaml"


def _names(kind: inspect.Type) -> set[str]:
    if isinstance(kind, inspect.StructType):
        return {field.encode_name for field in kind.fields} | set().union(
            *(_names(field.type) for field in kind.fields)
        )
    if isinstance(kind, inspect.DictType):
        return _names(kind.value_type)
    if isinstance(kind, inspect.ListType):
        return _names(kind.item_type)
    return set()


def test_the_schema_knows_every_option() -> None:
    text = json.dumps(config_schema())
    assert [name for name in sorted(_names(inspect.type_info(Settings))) if f'"{name}"' not in text] == []


def test_the_shipped_file_shows_every_option() -> None:
    text = SHIPPED.read_text()
    wanted = _names(inspect.type_info(Settings))
    assert [name for name in sorted(wanted) if not re.search(rf"\b{name}\b", text)] == []


def test_no_secret_is_shown() -> None:
    settings = Settings(
        runners={"r": Runner(command=["x"], env={"TOKEN": "s3cret"})},
        sinks={"s": Sink(type="webhook", url="http://x", headers={"Authorization": "s3cret"})},
    )
    shown = settings_as_json(settings)
    assert "s3cret" not in json.dumps(shown)
    assert shown["runners"]["r"]["env"] == {"TOKEN": "***"}


def test_durations_are_shown_in_seconds_and_sizes_in_bytes() -> None:
    shown = settings_as_json(Settings())
    assert (shown["retention"]["events"], shown["limits"]["line_bytes_max"]) == (90 * 86400, 1024 * 1024)
