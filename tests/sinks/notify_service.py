"""A notification service (as apprise's json:// and ntfy:// call it) that does what the file `mode` says. One process.

    python notify_service.py FOLDER FD    FD: the listening socket

Notes each request in FOLDER/asked, and in FOLDER/received the last word of each message that it took, with its path before it.
"""

import contextlib
import gzip
import json
import os
import socket
import sys
import threading
import time

folder, listening = sys.argv[1], socket.socket(fileno=int(sys.argv[2]))
lock = threading.Lock()
VAST = 100_000_000


def mode(path: str) -> str:
    """Of this path (its own file wins)."""
    for name in (f"mode-{path.strip('/')}", "mode"):
        try:
            with open(os.path.join(folder, name)) as file:
                return file.read().strip()
        except OSError:
            continue
    return "good"


def note(name: str, text: str) -> None:
    with lock, open(os.path.join(folder, name), "a") as file:
        file.write(text + "\n")


def take(path: str, body: bytes) -> None:
    said = json.loads(body)
    note("messages", json.dumps({"path": path, **said}))
    note("received", f"{path} {said['message'].split()[-1]}")


def read(connection: socket.socket) -> tuple[str, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        block = connection.recv(65536)
        if not block:
            raise OSError("gone")
        data += block
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    length = next(int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length:"))
    while len(body) < length:
        body += connection.recv(65536)
    return lines[0].split()[1], body


def answer(connection: socket.socket, status: int, body: bytes = b"{}", more: str = "") -> None:
    head = f"HTTP/1.1 {status} So\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{more}\r\n"
    connection.sendall(head.encode() + body)


def serve(connection: socket.socket) -> None:
    with connection:
        if mode("") == "crashing":
            return
        path, body = read(connection)
        path = path.split("?")[0]
        now = mode(path)
        note("asked", path)
        if now == "hanging":
            while mode(path) == "hanging":
                time.sleep(0.005)
            return
        if now == "late":  # it takes it, and its answer comes when the mode changes
            take(path, body)
            while mode(path) == "late":
                time.sleep(0.005)
        elif now in ("good", "ambiguous") or (now.startswith("vast") and "refusing" not in now):
            take(path, body)
        if now == "ambiguous":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            return
        if now.startswith("vast"):
            answer_vastly(connection, now.removeprefix("vast "))
        elif now == "huge answer":
            answer(connection, 500, b"no\x07" * 3_000_000)
        elif now == "deferring":
            answer(connection, 503, b"later, token-in-an-answer")
        elif now.isdigit():
            answer(connection, int(now))
        else:
            answer(connection, 200)


def answer_vastly(connection: socket.socket, kind: str) -> None:
    """100 MB, in one of the ways in which a body may come."""
    head, block, blocks = "HTTP/1.1 200 OK\r\n", bytes(VAST // 100), 100
    if kind == "packed":
        block, blocks = gzip.compress(bytes(VAST), 1), 1
        head += f"Content-Encoding: gzip\r\nContent-Length: {len(block)}\r\n"
    elif kind == "chunked":
        block = b"%x\r\n%s\r\n" % (len(block), block)
        head += "Transfer-Encoding: chunked\r\n"
    elif kind == "refusing":
        head = f"HTTP/1.1 503 No\r\nContent-Length: {VAST}\r\n"
    elif kind == "redirecting":  # and none of it can be unpacked
        head = f"HTTP/1.1 307 So\r\nLocation: /landed\r\nContent-Encoding: gzip\r\nContent-Length: {VAST}\r\n"
    elif kind == "longer":
        blocks = 300
    connection.sendall(head.encode() + b"Connection: close\r\n\r\n")
    for _ in range(blocks):
        connection.sendall(block)


def safely(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        serve(connection)


while True:
    threading.Thread(target=safely, args=(listening.accept()[0],), daemon=True).start()
