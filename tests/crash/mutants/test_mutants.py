"""Every mutant is caught, and the copy itself is sound."""

from __future__ import annotations

from pathlib import Path

import pytest

from crash.mutants import MUTANTS, Mutant, copy_tree, run_mutant, run_test, was_caught

pytestmark = [pytest.mark.real, pytest.mark.root, pytest.mark.timeout(200)]


def test_the_copy_passes_before_it_is_broken(tmp_path: Path) -> None:
    copy_tree(tmp_path / "tree")
    done = run_test("test_order.py::test_each_step_waits_for_the_one_before", tmp_path / "tree")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    done = run_mutant(mutant, tmp_path / "tree")
    assert was_caught(mutant, done), (
        f"{mutant.name} was not caught:\n{done.stdout[-3000:]}\n{done.stderr[-1000:]}"
    )
