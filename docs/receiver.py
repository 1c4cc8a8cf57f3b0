#!/usr/bin/env python3
"""A receiver for agentqd's webhook sink: one effect for each entry, however often it comes. Standard library only.

    receiver.py PORT DATABASE SECRET_FILE     # one whsec_... a line; with two, either is accepted (key rotation)

1. It verifies before it looks at anything else, in constant time.
2. The id and the effect are written in ONE transaction; 200 is said only when that is on disk. So a lost answer, a crash at
   any instant, or the same entry twice at once cost nothing: what comes again is known and answered with 200.
3. Ids are kept for 90 days: longer than a sink tries (4 days) plus the time for which your dead letters may wait for a person.
4. The timestamp is that of the try, not of the entry: a retry after a day has a fresh one, so five minutes are enough. A large
   entry is signed before it is sent; give it longer if your line is slow.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import sqlite3
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOLERANCE_S, KEEP_S, BODY_BYTES_MAX = 300, 90 * 86400, 400 * 2**20
PORT, DATABASE, SECRET_FILE = int(sys.argv[1]), sys.argv[2], sys.argv[3]


def effect(db: sqlite3.Connection, entry: dict) -> None:
    """Your part. Write through `db` and nowhere else, so that it is one transaction with the id."""
    db.execute("INSERT INTO effects (id, type, data) VALUES (?, ?, ?)", (entry["id"], entry["type"], json.dumps(entry["data"])))  # fmt: skip


def is_signed(body: bytes, entry_id: str, timestamp: str, signatures: str) -> bool:
    if not timestamp.isdecimal() or abs(time.time() - int(timestamp)) > TOLERANCE_S:
        return False
    given = [
        value.encode()
        for name, _, value in (each.partition(",") for each in signatures.split())
        if name == "v1"
    ]
    good = False
    with open(SECRET_FILE, encoding="utf-8") as file:
        for line in map(str.strip, file):
            if not line.startswith("whsec_"):  # blank, or a comment
                continue
            key = base64.b64decode(line.removeprefix("whsec_"))
            made = hmac.new(key, f"{entry_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
            for one in given:
                good |= hmac.compare_digest(base64.b64encode(made), one)
    return good


class Receiver(BaseHTTPRequestHandler):
    protocol_version, timeout = "HTTP/1.1", 60

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", "0"))
        if length > BODY_BYTES_MAX:
            self.close_connection = True
            return self.say(413)
        body = self.rfile.read(length)
        entry_id = self.headers.get("webhook-id", "")
        if not is_signed(body, entry_id, self.headers.get("webhook-timestamp", ""), self.headers.get("webhook-signature", "")):  # fmt: skip
            return self.say(401)
        db = connect()
        try:
            with db:  # commits, or rolls back what it has begun
                db.execute("BEGIN IMMEDIATE")
                new = db.execute(
                    "INSERT OR IGNORE INTO ids (id, at) VALUES (?, ?)", (entry_id, time.time())
                ).rowcount
                if new:
                    effect(db, json.loads(body))
                    db.execute("DELETE FROM ids WHERE at < ?", (time.time() - KEEP_S,))
        finally:
            db.close()
        return self.say(200)  # an exception above closes the connection: the sender comes again

    def say(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def connect() -> sqlite3.Connection:
    db = sqlite3.connect(DATABASE, timeout=20, isolation_level=None)
    db.execute("PRAGMA synchronous = FULL")
    return db


if __name__ == "__main__":
    with connect() as made:
        made.execute("CREATE TABLE IF NOT EXISTS ids (id TEXT PRIMARY KEY, at REAL NOT NULL)")
        made.execute("CREATE TABLE IF NOT EXISTS effects (id TEXT, type TEXT, data TEXT)")
    ThreadingHTTPServer(("127.0.0.1", PORT), Receiver).serve_forever()
