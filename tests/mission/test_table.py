"""docs/mission.md says what is true: every row, the tests that it names, and the switches that they notice."""

import ast
import hashlib
import os
import re
from pathlib import Path

import pytest

from mission.switches import ROOT, SWITCHES, Switch, node_ids, throw

FOLDER = Path(__file__).parent
A_RUN = 6  # switches of one run; AGENTQD_SWITCHES=all runs every one


def table() -> dict[int, list[str]]:
    """Row → its cells."""
    rows = {}
    for line in (ROOT / "docs" / "mission.md").read_text().splitlines():
        if match := re.match(r"\| (\d+) \|", line):
            rows[int(match[1])] = re.split(r"(?<!\\) \| ", line.strip("| "))
    return rows


def marked() -> dict[str, set[int]]:
    """`module.py::test` → the rows it is marked with."""
    found = {}
    for path in FOLDER.glob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                calls = [each for each in node.decorator_list if isinstance(each, ast.Call)]
                marks = [each for each in calls if ast.unparse(each.func) == "pytest.mark.row"]
                found[f"{path.name}::{node.name}"] = {
                    int(ast.unparse(arg)) for each in marks for arg in each.args
                }
    return found


def test_every_row_of_the_mission_stands_in_the_table_once() -> None:
    assert list(table()) == list(range(1, 81))


def test_every_test_that_the_table_names_exists_and_carries_its_rows_mark() -> None:
    tests = marked()
    for row, cells in table().items():
        named = re.findall(r"`(test_\w+\.py::test_\w+)`", cells[3])
        for name in named:
            assert row in tests.get(name, set()), f"row {row} names {name}"
        assert named or re.search(r"issue \d+", cells[3]), (
            f"row {row} names neither a test nor the issue that brings it"
        )


def test_every_mark_is_a_row_and_every_row_with_a_test_has_a_switch() -> None:
    rows = set().union(*marked().values())
    assert rows <= set(range(1, 81))
    assert rows == {switch.row for switch in SWITCHES}
    tests = marked()
    for switch in SWITCHES:
        for node_id in node_ids(switch):
            assert switch.row in tests[node_id.removeprefix("tests/mission/")]


def test_every_line_to_break_is_there_once_and_stands_in_the_table() -> None:
    rows = table()
    for switch in SWITCHES:
        for each in switch.breaks:
            assert (ROOT / each.file).read_text().count(each.old) == 1, (
                f"row {switch.row}: {each.file}: {each.old}"
            )
        assert f"`{switch.breaks[0].file.removeprefix('agentqd/')}`" in rows[switch.row][4], (
            f"row {switch.row}"
        )


def handful() -> list[Switch]:
    """Another few whenever a file that one of them breaks has changed; the same ones for the same tree."""
    if os.environ.get("AGENTQD_SWITCHES") == "all":
        return list(SWITCHES)
    source = b"".join(
        (ROOT / name).read_bytes()
        for name in sorted({each.file for switch in SWITCHES for each in switch.breaks})
    )

    def place(switch: Switch) -> bytes:
        return hashlib.sha256(source + str(switch.row).encode()).digest()

    return sorted(SWITCHES, key=place)[:A_RUN]


@pytest.mark.real
@pytest.mark.timeout(180)
@pytest.mark.parametrize("switch", handful(), ids=lambda switch: f"row-{switch.row}")
def test_a_row_whose_mechanism_is_broken_is_noticed(switch: Switch) -> None:
    noticed, what = throw(switch)
    assert noticed, what
