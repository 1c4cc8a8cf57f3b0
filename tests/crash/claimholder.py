"""The COMMAND of a claim: notes that it runs, and whether its claim stands in the journal, until the file `go` is there.

claimholder.py JOURNAL RECORD GO NAME
"""

from __future__ import annotations

import os
import sqlite3
import sys
import time

SQL = "SELECT pid FROM outside_claims WHERE id = ? AND held_at IS NOT NULL"


def is_held(journal: str) -> bool:
    connection = sqlite3.connect(f"file:{journal}?mode=ro", uri=True, timeout=30)
    try:
        row: tuple[int] | None = connection.execute(SQL, (os.environ["AGENTQ_CLAIM_ID"],)).fetchone()
    finally:
        connection.close()
    return row == (os.getpid(),)


def main(journal: str, record: str, go: str, name: str) -> None:
    lines = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(lines, f"{os.getpid()} {name} begins {is_held(journal)}\n".encode())
    while not os.path.exists(go):
        time.sleep(0.01)
    os.write(lines, f"{os.getpid()} {name} ends {is_held(journal)}\n".encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
