"""Run the mutants by hand: a line for each, exit 1 if one is not caught."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from crash.mutants import MUTANTS, run_mutant, was_caught


def main() -> int:
    chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or mutant.name in sys.argv[1:]]
    missed = 0
    for mutant in chosen:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="m-", dir="/tmp") as folder:
            done = run_mutant(mutant, Path(folder))
        caught = was_caught(mutant, done)
        missed += not caught
        print(
            f"{'caught' if caught else 'MISSED':7} {time.monotonic() - began:5.1f} s  {mutant.name}  ({mutant.test})",
            flush=True,
        )
        if not caught:
            print(done.stdout[-3000:], done.stderr[-1000:])
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
