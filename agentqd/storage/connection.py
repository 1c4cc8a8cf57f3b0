"""How the journal's file is opened: pragmas, the warm log, migrations. Only `journal` keeps what is opened here.

SQLite from 3.7.0 to 3.51.2 can corrupt a WAL database when two connections write or checkpoint at once: hence ONE
connection from `connect`, and readers that can do neither.
"""

from __future__ import annotations

import importlib.resources
import sqlite3
from typing import Final

from agentqd.core import limits
from agentqd.core.errors import SchemaTooNew, StateFolderError

_WAL_WARM_BYTES: Final = 8 * limits.MIB


def connect(path: str) -> sqlite3.Connection:
    """The writing connection, with the pragmas that the promises above rest on."""
    connection = sqlite3.connect(
        path, isolation_level=None, check_same_thread=False, cached_statements=256, timeout=10
    )
    try:
        _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: str) -> None:
    mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
    if mode != "wal":
        raise StateFolderError(
            f"{path}: SQLite cannot use a write-ahead log here (it says {mode!r}); use a local disk"
        )
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA wal_autocheckpoint=0")
    connection.execute("PRAGMA cache_size=-8192")
    connection.execute("PRAGMA temp_store=MEMORY")
    connection.execute("PRAGMA foreign_keys=OFF")


def connect_reader(path: str) -> sqlite3.Connection:
    reader = sqlite3.connect(
        path, isolation_level=None, check_same_thread=False, cached_statements=128, timeout=10
    )
    reader.execute("PRAGMA query_only=1")
    reader.execute("PRAGMA wal_autocheckpoint=0")
    reader.execute("PRAGMA cache_size=-4096")
    return reader


def warm_log(connection: sqlite3.Connection) -> None:
    """Let the write-ahead log's file grow once, so that later commits overwrite blocks that exist.

    An fdatasync of a file that grows makes the file system commit its own journal, with whatever metadata other programs
    have dirtied (here about 2 ms beside busy workers); of one that does not grow, it writes the data (about 0.1 ms).
    """
    connection.execute("CREATE TABLE IF NOT EXISTS warmth (x BLOB)")
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO warmth VALUES (zeroblob(?))", (_WAL_WARM_BYTES,))
    connection.execute("COMMIT")
    connection.execute("DROP TABLE warmth")
    connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()


def migrate(connection: sqlite3.Connection, path: str) -> None:
    """Bring the schema to the newest number, one transaction a step. Refuses a newer one (SchemaTooNew)."""
    have = connection.execute("PRAGMA user_version").fetchone()[0]
    steps = _migrations()
    newest = max(steps)
    if have > newest:
        raise SchemaTooNew(
            f"{path} has schema {have}, this agentqd knows up to {newest}; install the newer agentqd again"
        )
    for number in sorted(steps):
        if number > have:
            connection.executescript(
                f"BEGIN IMMEDIATE;\n{steps[number]}\nPRAGMA user_version={number};\nCOMMIT;"
            )


def _migrations() -> dict[int, str]:
    folder = importlib.resources.files("agentqd.storage") / "migrations"
    found: dict[int, str] = {}
    for item in folder.iterdir():
        if item.name.endswith(".sql"):
            number = int(item.name.split("_")[0])
            assert number not in found, f"two migrations have the number {number}: one would never be made"
            found[number] = item.read_text("utf-8")
    return found
