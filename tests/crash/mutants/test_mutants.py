"""Every mutant is caught, and the copy itself is sound."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from crash.mutants import MUTANTS, Mutant, copy_tree, run_mutant, run_test, was_caught

pytestmark = [pytest.mark.real, pytest.mark.root, pytest.mark.timeout(200)]


@pytest.fixture
def tree() -> Iterator[Path]:
    """Shorter than tmp_path: the boxes in it have sockets, whose paths have 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="m-", dir="/tmp") as folder:
        yield Path(folder)


def test_the_copy_passes_before_it_is_broken(tree: Path) -> None:
    copy_tree(tree)
    done = run_test("test_order.py::test_each_step_waits_for_the_one_before", tree)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_caught(mutant: Mutant, tree: Path) -> None:
    done = run_mutant(mutant, tree)
    assert was_caught(mutant, done), (
        f"{mutant.name} was not caught:\n{done.stdout[-3000:]}\n{done.stderr[-1000:]}"
    )
