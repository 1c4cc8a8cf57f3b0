"""config/agentqd.yaml, its examples, and what a mistake in it is told as."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentqd.core.config_schema import config_schema, settings_as_json
from agentqd.core.errors import ConfigError
from agentqd.core.settings import Settings
from agentqd.storage.configfile import load_settings

SHIPPED = Path(__file__).parents[2] / "config" / "agentqd.yaml"
OPTION = re.compile(r"^(\s*)# ((?:- )?[a-z_-]+:.*|    +.*)$")


def _load(path: Path, text: str) -> Settings:
    path.write_text(text)
    return load_settings(str(path)).settings


def _uncommented(text: str) -> str:
    """Every example and every `not set` default switched on; what a later version brings stays off."""
    lines = []
    for line in text.splitlines():
        if "comes with a later version" in line:
            lines.append(line)
            continue
        if re.match(r"^#   +\S", line):  # an example under an empty part
            while lines and re.fullmatch(r"(queues|runners|sinks): \{\}|routes: \[\]", lines[-1]):
                lines[-1] = lines[-1].split(":")[0] + ":"
            lines.append(" " + line[1:])
        elif match := re.match(r"^( *)# ([a-z_]+: .*)$", line):
            lines.append(match[1] + match[2])
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def test_uncommenting_every_example_loads(tmp_path: Path) -> None:
    text = _uncommented(SHIPPED.read_text())
    settings = _load(tmp_path / "all.yaml", text)
    assert set(settings.queues) == {"agents"}
    assert {"claude", "codex", "gemini", "opencode", "aider", "careful-claude"} == set(settings.runners)
    assert set(settings.sinks) == {"archive", "tell-me", "laptop", "mail", "hook", "people"}
    assert settings.routes[0].deliver_to == ["tell-me"]
    assert settings.max_workers == 8
    assert settings.defaults.silence_timeout == 900
    assert settings.control.mode == "0660"
    assert len(re.findall(r"^ *# [a-z_]+: ", text, re.MULTILINE)) <= 1, "only the canary stays off"


def _fits(value: Any, schema: dict[str, Any], where: str = "$") -> list[str]:
    """As much of JSON Schema as config_schema uses; the problems."""
    for word in ("anyOf", "oneOf"):
        if word in schema:
            found = [_fits(value, each, where) for each in schema[word]]
            return [] if any(not each for each in found) else found[0]
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{where}: {value!r} is none of {schema['enum']}"]
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float), "null": type(None)}  # fmt: skip
    if not isinstance(value, kinds[schema["type"]]) or (
        isinstance(value, bool) and schema["type"] != "boolean"
    ):
        return [f"{where}: {value!r} is no {schema['type']}"]
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return [f"{where}: {value!r} is not like {schema['pattern']}"]
    if "minimum" in schema and value < schema["minimum"]:
        return [f"{where}: {value!r} is too small"]
    problems = []
    if isinstance(value, dict):
        known, other = schema.get("properties", {}), schema["additionalProperties"]
        for name, item in value.items():
            if name in known:
                problems += _fits(item, known[name], f"{where}.{name}")
            elif other is False:
                problems.append(f"{where}.{name} is unknown")
            else:
                problems += _fits(item, other, f"{where}.{name}")
        problems += [f"{where}.{name} is missing" for name in schema.get("required", []) if name not in value]
    if isinstance(value, list):
        for n, item in enumerate(value):
            problems += _fits(item, schema["items"], f"{where}[{n}]")
    return problems


@pytest.mark.parametrize("text", [SHIPPED.read_text(), _uncommented(SHIPPED.read_text())], ids=["as it is", "all examples"])  # fmt: skip
def test_the_schema_takes_the_shipped_file(text: str) -> None:
    assert _fits(yaml.safe_load(text), config_schema()) == []


@pytest.mark.parametrize(
    "value",
    [{"queuez": {}}, {"queues": {"a": {"concurrency": "many"}}}, {"defaults": {"on_lost": "cry"}}, {"defaults": {"run_timeout": "soon"}},
     {"sinks": {"s": {"path": "/x"}}}, {"limits": {"line_bytes_max": "1XB"}}, {"sinks": {"s": {"type": "file", "path": "/x", "rate": "10/w"}}}, {"routes": {}}, {"runners": {"r": {"env": {"A": 1}}}}],
)  # fmt: skip
def test_the_schema_refuses_what_the_reader_refuses(tmp_path: Path, value: dict[str, Any]) -> None:
    assert _fits(value, config_schema())
    with pytest.raises(ConfigError):
        _load(tmp_path / "bad.yaml", json.dumps(value))


def test_the_settings_as_shown_fit_the_schema_and_can_be_loaded_again(tmp_path: Path) -> None:
    settings = _load(tmp_path / "all.yaml", _uncommented(SHIPPED.read_text()))
    shown = json.loads(json.dumps(settings_as_json(settings)))

    def without_nulls(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without_nulls(item) for name, item in value.items() if item is not None}
        return [without_nulls(item) for item in value] if isinstance(value, list) else value

    again = _load(tmp_path / "shown.yaml", json.dumps(without_nulls(shown)))
    assert settings_as_json(again) == settings_as_json(settings)
    assert shown["runners"]["careful-claude"]["env"] == {"DISABLE_AUTOUPDATER": "***"}


MISTAKES = [
    ("max_worker: 2", 1, "max_worker", "did you mean max_workers"),
    ("queues:\n  a:\n    concurency: 2", 3, "queues.a.concurency", "did you mean concurrency"),
    ("queues:\n  a: {concurrency: 0}", 2, "queues.a.concurrency", "at least 1"),
    ("queues:\n  a: 7", 2, "queues.a", "expected"),
    ("defaults:\n  run_timeout: soon", 2, "defaults.run_timeout", "duration"),
    ("defaults:\n  run_timeout: -1s", 2, "defaults.run_timeout", "duration"),
    ("defaults:\n  on_lost: cry", 2, "defaults.on_lost", "cry"),
    ("defaults:\n  queue: nihgt\nqueues: {night: {}}", 2, "defaults.queue", "did you mean night"),
    ("defaults:\n  warning_signal: SIGKILL", 2, "defaults.warning_signal", "SIGUSR1"),
    ("runners:\n  r: {preset: claud}", 2, "runners.r.preset", "did you mean claude"),
    ("runners:\n  r:\n    command: [x]\n    prompt: arg", 4, "runners.r.prompt", "arg"),
    ("runners:\n  r:\n    command: [x, '{promt}']", 3, "runners.r.command", "did you mean {prompt}"),
    ("sinks:\n  s: {type: fiel, path: /x}", 2, "sinks.s.type", "did you mean file"),
    ("sinks:\n  s: {type: file}", 2, "sinks.s", "needs path"),
    ("sinks:\n  s: {type: file, path: rel}", 2, "sinks.s.path", "absolute"),
    (
        "routes:\n  - match: {}\n    deliver_to: [complet]",
        3,
        "routes[0].deliver_to",
        "did you mean completions",
    ),
    (
        "routes:\n  - match: {result: sucess}\n    deliver_to: [completions]",
        2,
        "routes[0].match.result",
        "did you mean success",
    ),
    (
        "routes:\n  - match: {type: agentq.task.sucess}\n    deliver_to: [completions]",
        2,
        "routes[0].match.type",
        "did you mean agentq.task.success",
    ),
    ("sinks:\n  s: {type: file, path: /x, rate: fast}", 2, "sinks.s.rate", "10/s"),
    (
        "queues:\n  q:\n    allow_deliver_to: [mial]\nsinks: {mail: {type: file, path: /x}}",
        3,
        "queues.q.allow_deliver_to",
        "did you mean mail",
    ),
    (
        "runners:\n  shell: {allow_deliver_to: [complet]}",
        2,
        "runners.shell.allow_deliver_to",
        "did you mean completions",
    ),
    ("limits:\n  line_bytes_max: lots", 2, "limits.line_bytes_max", "size"),
    ("limits:\n  line_bytes_max: 99999999999TB", 2, "limits.line_bytes_max", "size"),
    ("control:\n  mode: 0777", 2, "control.mode", "0660"),
    ("log:\n  level: loud", 2, "log.level", "loud"),
    ("max_workers: yes", 1, "max_workers", "a whole number"),
    ("alerts:\n  stalled_loop: 1s", 2, "alerts.stalled_loop", "60s"),
]


@pytest.mark.parametrize(("text", "line", "key", "said"), MISTAKES, ids=[each[2] + "-" + str(n) for n, each in enumerate(MISTAKES)])  # fmt: skip
def test_a_mistake_is_told_with_path_line_key_and_a_way_out(tmp_path: Path, text: str, line: int, key: str, said: str) -> None:  # fmt: skip
    path = tmp_path / "agentqd.yaml"
    with pytest.raises(ConfigError) as caught:
        _load(path, text + "\n")
    (problem,) = caught.value.fields["problems"]
    assert (problem["path"], problem["line"], problem["key"]) == (str(path), line, key)
    assert said in problem["message"]
    assert caught.value.message == f"{path}:{line}: {key}: {problem['message']}"
