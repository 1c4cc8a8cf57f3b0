"""Reading the config file: every mistake is told with its line, and nothing but ConfigError ever comes out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from budget import tries
from hypothesis import HealthCheck, given, settings, strategies

from agentqd.core.errors import ConfigError
from agentqd.core.settings import BUILT_IN, Defaults, Settings
from agentqd.storage.configfile import load_settings

SHIPPED = Path(__file__).parents[2] / "config" / "agentqd.yaml"


def _load(folder: Path, raw: str | bytes) -> Settings:
    file = folder / "agentqd.yaml"
    file.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return load_settings(str(file)).settings


def _problems(folder: Path, raw: str | bytes) -> list[tuple[int | None, str, str]]:
    with pytest.raises(ConfigError) as caught:
        _load(folder, raw)
    found = caught.value.fields["problems"]
    for each in found:
        assert f"{folder}/agentqd.yaml:{each['line']}: " in caught.value.message
    return [(each["line"], each["key"], each["message"]) for each in found]


def test_without_a_file_the_defaults_hold() -> None:
    assert load_settings(None).settings == Settings()


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n", "queues:\ndefaults:\n"])
def test_a_file_that_says_nothing_is_the_defaults(tmp_path: Path, text: str) -> None:
    assert _load(tmp_path, text) == Settings()


def test_the_shipped_file_says_what_holds_without_it() -> None:
    shipped = load_settings(str(SHIPPED)).settings
    for name in Defaults.__struct_fields__:
        said = getattr(shipped.defaults, name)
        assert said is None or said == getattr(BUILT_IN, name)
    for name in Settings.__struct_fields__:
        assert name == "defaults" or getattr(shipped, name) == getattr(Settings(), name)


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    text = "max_workerz: 1\nlog:\n  level: lout\nqueues:\n  a: {concurrency: 2}\n  b: {concurrency: many}\nmax_workers: x\n"
    assert [(line, key) for line, key, _ in _problems(tmp_path, text)] == [
        (1, "max_workerz"), (3, "log.level"), (6, "queues.b.concurrency"), (7, "max_workers"),
    ]  # fmt: skip


def test_an_unknown_option_names_its_nearest(tmp_path: Path) -> None:
    [(line, key, message)] = _problems(tmp_path, "log:\n  levle: info\n")
    assert (line, key) == (2, "log.levle")
    assert "did you mean level?" in message


def test_the_second_of_two_equal_keys_is_the_problem(tmp_path: Path) -> None:
    [(line, key, message)] = _problems(tmp_path, "log: {level: info}\nmax_workers: 2\nlog: {level: debug}\n")
    assert (line, key) == (3, "log")
    assert "line 1" in message


def test_the_sink_without_a_type_is_blamed_and_not_its_neighbour(tmp_path: Path) -> None:
    text = "sinks:\n  good: {type: file, path: /x}\n  bad: {path: /y}\n"
    assert [(line, key) for line, key, _ in _problems(tmp_path, text)] == [(3, "sinks.bad")]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("queues:\n\ta: 1\n", 2),
        ("- a\n", 1),
        ("a: 1\nb: [\n", 3),
        ("---\na: 1\n---\nb: 1\n", 3),
        ("x: &a [*a]\n", 1),
        ("? [a]\n: 1\n", 1),
    ],
)
def test_what_is_no_mapping_of_options_has_a_line(tmp_path: Path, text: str, line: int) -> None:
    assert _problems(tmp_path, text)[0][0] == line


def test_bytes_that_are_not_utf8_have_a_line(tmp_path: Path) -> None:
    assert _problems(tmp_path, b"max_workers: 2\nlog: {level: \xff}\n")[0][0] == 2


@pytest.mark.parametrize("value", ["on", "yes", "off", "no", "y"])
def test_words_of_yaml_1_1_are_no_booleans(tmp_path: Path, value: str) -> None:
    [(line, key, _)] = _problems(tmp_path, f"queues:\n  a:\n    paused: {value}\n")
    assert (line, key) == (3, "queues.a.paused")


def test_a_queue_may_be_called_on(tmp_path: Path) -> None:
    assert set(_load(tmp_path, "queues:\n  on: {concurrency: 1}\n  no: {concurrency: 1}\n").queues) == {
        "on",
        "no",
    }


def test_one_colon_thirty_is_not_ninety_seconds(tmp_path: Path) -> None:
    assert "1:30" in _problems(tmp_path, "alerts: {oldest_queued: 1:30}\n")[0][2]


@pytest.mark.parametrize("mode", ["0660", '"0660"', "660"])
def test_a_mode_means_what_it_looks_like(tmp_path: Path, mode: str) -> None:
    found = _load(tmp_path, f"control: {{group: agentq, mode: {mode}}}\n").control.mode
    assert found is not None
    assert int(found, 8) == 0o660


@pytest.mark.parametrize(
    "text",
    [
        'log: {level: "\\UFFFFFFFF"}\n',
        "alerts: {oldest_queued: " + "9" * 400 + "}\n",
        'limits: {line_bytes_max: "' + "9" * 400 + '"}\n',
        "max_workers: " + "9" * 5000 + "\n",
        "[" * 3000,
        "{a: " * 3000,
    ],
)
def test_monsters_are_told_and_never_crash_the_reader(tmp_path: Path, text: str) -> None:
    assert _problems(tmp_path, text)


def test_an_alias_bomb_is_refused_soon(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "too many" in _problems(tmp_path, "\n".join(lines))[0][2]


@pytest.mark.parametrize("path", ["missing.yaml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / path))):
        load_settings(str(tmp_path / path))


def test_a_path_with_a_nul_is_an_error_like_any_other() -> None:
    with pytest.raises(ConfigError):
        load_settings("/etc/agentqd\x00.yaml")


def test_several_problems_are_one_line_of_an_alert_or_of_status(tmp_path: Path) -> None:
    (tmp_path / "agentqd.yaml").write_text("max_workerz: 1\nlogg: {}\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(str(tmp_path / "agentqd.yaml"))
    assert "\n" not in caught.value.message
    assert f"; {tmp_path}/agentqd.yaml:2: logg: " in caught.value.message


@pytest.mark.parametrize(
    ("option", "key", "said"),
    [
        ("tls: ssl", "tls", "there is no tls 'ssl'; it is one of none, starttls, tls"),
        ("mode: files", "mode", "there is no mode 'files'; it is one of append, file; did you mean file?"),
        ("mode: 'it''s'", "mode", "it is one of append, file"),
        ("allow_to: me", "allow_to", "expected a list, got a text"),
        ("to: 5", "to", "got a whole number"),
        ("port: [25]", "port", "expected a whole number, got a list"),
    ],
)
def test_a_value_of_a_wrong_kind_is_told_in_plain_words(
    tmp_path: Path, option: str, key: str, said: str
) -> None:
    text = f"sinks:\n  s:\n    type: email\n    host: h\n    from: a@example.org\n    {option}\n"
    [(line, found, message)] = _problems(tmp_path, text)
    assert (line, found) == (6, f"sinks.s.{key}")
    assert said in message
    assert "`" not in message


def test_the_nearest_option_of_a_sink_is_one_that_its_type_has(tmp_path: Path) -> None:
    text = "sinks:\n  s:\n    type: notify\n    urls_file: /x\n    urls: []\n"
    [(line, key, message)] = _problems(tmp_path, text)
    assert (line, key) == (5, "sinks.s.urls")
    assert "did you mean urls_file?" in message


def test_a_file_sink_in_the_state_folder_is_refused_where_that_is_known(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "state")
    file = tmp_path / "agentqd.yaml"
    file.write_text(f"sinks:\n  s:\n    type: file\n    path: {tmp_path}/link/completions.jsonl\n")
    load_settings(str(file))
    with pytest.raises(ConfigError, match="state folder") as caught:
        load_settings(str(file), str(tmp_path / "state"))
    assert [each["line"] for each in caught.value.fields["problems"]] == [4]


_words = strategies.sampled_from(
    ["queues", "sinks", "runners", "defaults", "log", "level", "type", "run_timeout", "a", "on", "1:30", "0660", "~", "*x",
     "&x", "!!int", "<<", "-", "?", ":", "{", "}", "[", "]", "\n", "\n  ", "\n    ", " ", "\t", ": ", "- ", '"', "'", "#", "\\U"]
)  # fmt: skip


@settings(
    max_examples=tries(300), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    text=strategies.one_of(strategies.lists(_words, max_size=25).map("".join), strategies.text(max_size=60))
)
def test_any_text_loads_or_is_a_config_error_with_a_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "any.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_settings(str(file))
    except ConfigError as error:
        raised = error
    else:
        return
    assert raised.fields["problems"]
    assert all(each["line"] >= 1 for each in raised.fields["problems"])
    assert str(file) in raised.message
