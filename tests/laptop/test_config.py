"""The laptop's config: what may stand in it, what is said about the rest, and that writing it leaves the rest alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agentqd.cli.warm import box_of
from agentqd.client.boxes import find_box, load_boxes, parse_boxes
from agentqd.client.boxfile import add_box, remove_box
from agentqd.client.boxname import check_box_name
from agentqd.client.boxurl import Address, parse_box_url
from agentqd.client.clientid import client_id
from agentqd.client.errors import NoSuchBox
from agentqd.client.remotelines import APPEND_BYTES_MAX, LINE_BYTES_MAX, packets
from agentqd.core.errors import AgentqError, ConfigError, InvalidTask

GOOD = """\
# my boxes
boxes:
  worker:            # the fast one
    url: ssh://me@worker.example:2222
    keep: 5m

  # the small one
  pi:
    url: ssh://pi
    state_dir: /srv/agentqd/
"""


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ssh://host", Address("host")),
        ("ssh://me@host", Address("host", "me")),
        ("ssh://me@host:22/", Address("host", "me", 22)),
        ("ssh://me@[::1]:2222", Address("::1", "me", 2222)),
        ("ssh://a.b-c_d@10.0.0.1", Address("10.0.0.1", "a.b-c_d")),
    ],
)
def test_a_url_is_read(text: str, address: Address) -> None:
    assert parse_box_url(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "", "host", "http://host", "ssh://", "ssh://me@", "ssh://me:secret@host", "ssh://host:0", "ssh://host:65536",
        "ssh://host:x", "ssh://host/path", "ssh://-oProxyCommand=x", "ssh://me@-x", "ssh://ho st", "ssh://host:22:22",
        "ssh://host\nx", "ssh://-l@host", "ssh://a@b@c",
    ],
)  # fmt: skip
def test_what_is_no_url_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_box_url(text)


@given(st.text(max_size=40))
def test_no_text_makes_an_address_that_could_be_an_option(text: str) -> None:
    try:
        found = parse_box_url("ssh://" + text)
    except ValueError:
        return
    assert not found.host.startswith("-")
    assert not (found.user or "").startswith("-")
    assert found.port is None or 0 < found.port < 65536


@pytest.mark.parametrize("name", ["all", "", "-x", "a b", "a/b", "..", "x" * 33, "ä"])
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        check_box_name(name)


def test_a_good_file_is_read() -> None:
    boxes = parse_boxes("c", GOOD)
    assert list(boxes) == ["worker", "pi"]
    assert boxes["worker"].keep_s == 300
    assert boxes["pi"].state_dir == "/srv/agentqd"


@pytest.mark.parametrize("text", ["", "# nothing\n", "boxes:\n", "boxes: {}\n"])
def test_an_empty_file_has_no_boxes(text: str) -> None:
    assert parse_boxes("c", text) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("boxs: {}\n", "c:1: boxs: unknown option; did you mean boxes?"),
        ("boxes:\n  a:\n    ulr: ssh://h\n", "c:3: boxes.a.ulr: unknown option; did you mean url?"),
        ("boxes:\n  a: {}\n", "c:2: boxes.a: needs url"),
        ("boxes:\n  a: ssh://h\n", "c:2: boxes.a: is a mapping"),
        ("boxes:\n  a:\n    url: h\n", "c:3: boxes.a.url: 'h' is not ssh://"),
        ("boxes:\n  a:\n    url: ssh://h\n    keep: soon\n", "c:4: boxes.a.keep: "),
        ("boxes:\n  a:\n    url: ssh://h\n    state_dir: x\n", "c:4: boxes.a.state_dir: 'x' is not an absolute path"),
        ("boxes:\n  a:\n    url: ssh://h\n  a:\n    url: ssh://h\n", "c:4: boxes.a: stands here twice (first in line 2)"),
        ("boxes:\n  all:\n    url: ssh://h\n", "c:2: boxes.all: `all` means every box"),
        ("boxes:\n  a:\n    url: [x]\n", "c:3: boxes.a.url: is a text"),
        ("boxes: [\n", "not YAML"),
        ("- a\n", "c:1: is a mapping"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_path_line_and_nearest_name(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_boxes("c", text)
    assert said in caught.value.message


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_boxes("c", "boxes:\n  a:\n    ulr: x\n  -b:\n    url: y\n")
    assert len(caught.value.fields["problems"]) == 4


def test_a_missing_box_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(GOOD)
    with pytest.raises(NoSuchBox, match="did you mean worker"):
        find_box(str(path), "wroker")


def test_adding_and_removing_leaves_everything_else_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "config.yaml"
    path.parent.mkdir()
    path.write_text(GOOD)
    add_box(str(path), "new", {"url": "ssh://new", "state_dir": "/x"}, replace=False)
    text = path.read_text()
    assert text.startswith(GOOD)
    assert load_boxes(str(path))["new"].state_dir == "/x"
    remove_box(str(path), "new")
    assert path.read_text() == GOOD
    remove_box(str(path), "worker")
    assert "# the small one" in path.read_text()
    assert list(load_boxes(str(path))) == ["pi"]
    remove_box(str(path), "pi")
    assert load_boxes(str(path)) == {}
    add_box(str(path), "again", {"url": "ssh://h"}, replace=False)
    assert list(load_boxes(str(path))) == ["again"]
    assert "# my boxes" in path.read_text()
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"], "no draft is left"


def test_a_taken_name_is_replaced_only_by_force(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "config.yaml")
    add_box(path, "a", {"url": "ssh://one"}, replace=False)
    with pytest.raises(AgentqError, match="--force"):
        add_box(path, "a", {"url": "ssh://two"}, replace=False)
    assert add_box(path, "a", {"url": "ssh://two"}, replace=True).url == "ssh://two"
    assert os.stat(path).st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "text",
    [
        "boxes: {a: {url: ssh://h}, b: {url: ssh://i}}\n",
        "boxes:\n    a: {url: ssh://h}\n    b:\n        url: ssh://i",
        "boxes: &x\n  a: &y {url: ssh://h}\n  b: *y\n",
        '{"boxes": {"a": {"url": "ssh://h"}, "b": {"url": "ssh://i"}}}',
    ],
)
def test_any_way_of_writing_it_survives_an_edit(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    before = load_boxes(str(path))
    add_box(str(path), "c", {"url": "ssh://c"}, replace=False)
    assert list(load_boxes(str(path))) == ["a", "b", "c"]
    remove_box(str(path), "c")
    assert load_boxes(str(path)) == before


def test_a_link_to_a_dotfiles_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "dotfiles").mkdir()
    real = tmp_path / "dotfiles" / "config.yaml"
    real.write_text(GOOD)
    link = tmp_path / "config.yaml"
    link.symlink_to(real)
    add_box(str(link), "new", {"url": "ssh://h"}, replace=False)
    assert link.is_symlink()
    assert "new" in load_boxes(str(real))


@given(st.lists(st.binary(max_size=9000).map(lambda raw: raw.replace(b"\n", b" ")), max_size=12))
def test_packets_carry_every_line_once_and_whole(lines: list[bytes]) -> None:
    bodies = list(packets(lines))
    assert b"".join(bodies) == b"".join(line + b"\n" for line in lines)
    assert all(body.endswith(b"\n") and len(body) <= APPEND_BYTES_MAX for body in bodies)


def test_one_line_too_long_refuses_all_of_them() -> None:
    assert [len(body) for body in packets([b"x" * LINE_BYTES_MAX])] == [APPEND_BYTES_MAX]
    with pytest.raises(InvalidTask):
        packets([b"short", b"x" * (LINE_BYTES_MAX + 1)])


def test_the_laptops_name_is_made_once(tmp_path: Path) -> None:
    env = {"XDG_STATE_HOME": str(tmp_path)}
    name = client_id(env)
    assert client_id(env) == name
    assert os.listdir(tmp_path / "agentqctl") == ["client-id"]
    (tmp_path / "agentqctl" / "client-id").write_text("no name\n")
    with pytest.raises(AgentqError, match="remove it"):
        client_id(env)


@pytest.mark.parametrize(
    ("words", "variable", "box"),
    [
        (["--box", "a", "status"], None, "a"),
        (["--box=a", "status"], None, "a"),
        (["status", "--box", "a"], "b", "a"),
        (["status"], "b", "b"),
        (["submit", "--command", "--", "x", "--box", "a"], None, None),
        (["--box", "a", "--help"], None, None),
        (["--box", "a", "version"], None, None),
        (["box", "test", "a"], "b", None),
        (["--socket", "/x", "status"], "b", None),
        (["--box"], None, None),
        ([], "b", None),
    ],
)
def test_the_box_is_seen_before_the_arguments_are_understood(
    words: list[str], variable: str | None, box: str | None
) -> None:
    assert box_of(words, {} if variable is None else {"AGENTQCTL_BOX": variable}) == box


def test_the_written_file_is_plain_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    add_box(str(path), "a", {"url": "ssh://h", "keep": "1h"}, replace=False)
    assert yaml.safe_load(path.read_text()) == {"boxes": {"a": {"url": "ssh://h", "keep": "1h"}}}
    assert json.dumps(load_boxes(str(path))["a"].as_json())
