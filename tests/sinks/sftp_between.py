"""Runs between a real sshd and a real sftp-server (as ForceCommand), passes packets on, and misbehaves as a file says.

    python sftp_between.py FOLDER    FOLDER/between holds the folder of the test; its file `mode` the condition.

It notes in `received` the delivery id of each file that was renamed into place, when the server says so, and in `operations`
what was asked for, in order.
"""

import os
import re
import struct
import subprocess
import sys
import threading

OPEN, CLOSE, WRITE, REMOVE, EXTENDED, STATUS = 3, 4, 6, 13, 200, 101
NAMES = {OPEN: "open", CLOSE: "close", WRITE: "write", REMOVE: "remove"}
server = subprocess.Popen(
    ["/usr/lib/openssh/sftp-server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
)
with open(os.path.join(sys.argv[1], "between")) as file:
    base = file.read().strip()
renames: dict[int, str] = {}
syncs: set[int] = set()


def mode() -> str:
    with open(os.path.join(base, "mode")) as file:
        return file.read().strip()


def note(name: str, text: str = "x") -> None:
    with open(os.path.join(base, name), "a") as file:
        file.write(text + "\n")


def die() -> None:
    server.kill()
    os._exit(1)


def packets(fd: int):
    data = b""
    while block := os.read(fd, 262144):
        data += block
        while len(data) >= 4 and len(data) >= 4 + (size := struct.unpack(">I", data[:4])[0]):
            yield data[: 4 + size]
            data = data[4 + size :]


def send(fd: int, packet: bytes) -> None:
    while packet:
        packet = packet[os.write(fd, packet) :]


def text_at(packet: bytes, at: int) -> tuple[bytes, int]:
    size = struct.unpack(">I", packet[at : at + 4])[0]
    return packet[at + 4 : at + 4 + size], at + 4 + size


def upwards() -> None:
    hanging, written = False, 0
    for packet in packets(0):
        kind, now = packet[4], mode()
        if now == "crashing":
            die()
        if hanging or now == "hanging":
            hanging = True
            note("asked")
            continue
        number = struct.unpack(">I", packet[5:9])[0]
        if kind == WRITE:
            written += len(packet)
            if now.startswith("cut") and written > int(now.split()[1]):
                send(server.stdin.fileno(), packet[: len(packet) // 2])
                die()
        if kind == OPEN and now == "huge answer":
            said = b"no\x07" * 80_000
            body = (
                bytes([STATUS])
                + struct.pack(">II", number, 4)
                + struct.pack(">I", len(said))
                + said
                + b"\0" * 4
            )
            send(1, struct.pack(">I", len(body)) + body)
            continue
        if kind in NAMES:
            note("operations", NAMES[kind])
        if kind == EXTENDED:
            what, at = text_at(packet, 9)
            note("operations", what.decode().partition("@")[0])
            if what == b"posix-rename@openssh.com":
                renames[number] = os.path.basename(text_at(packet, text_at(packet, at)[1])[0].decode())
            elif what == b"fsync@openssh.com":
                syncs.add(number)
        send(server.stdin.fileno(), packet)
    die()


def downwards() -> None:
    for packet in packets(server.stdout.fileno()):
        number = struct.unpack(">I", packet[5:9])[0]
        done = packet[4] == STATUS and struct.unpack(">I", packet[9:13])[0] == 0
        name = renames.pop(number, None)
        if done and name is not None and (found := re.fullmatch(r"(?:.*\.)?([A-Za-z0-9_-]+)\.json", name)):
            note("received", found[1])
        now = mode()
        if (
            done
            and now in ("ambiguous", "ambiguous append")
            and (number in syncs if "append" in now else name is not None)
        ):
            die()
        send(1, packet)
    die()


threading.Thread(target=downwards, daemon=True).start()
upwards()
