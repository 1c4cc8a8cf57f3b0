"""The way to the control socket where sshd forbids forwarding: a command on the box that joins it to stdin and stdout.

Its first line says how it went: `agentqd-relay ok`, or `agentqd-relay ERRNO`. Whatever a login script prints before
is passed over. Nothing is installed on the box: python3 if it is there, else socat or nc.
"""

from __future__ import annotations

import errno
import shlex

MARK = b"agentqd-relay "
NO_PROGRAM = -1
HELLO_COMMAND = "echo agentqd-relay ok"

_PYTHON = """
import os, socket, sys, threading
s = socket.socket(socket.AF_UNIX)
try:
    s.connect(sys.argv[1])
except OSError as e:
    os.write(1, b"agentqd-relay %d\\n" % (e.errno or 5))
    os._exit(1)
os.write(1, b"agentqd-relay ok\\n")
def up():
    try:
        while True:
            b = os.read(0, 65536)
            if not b:
                break
            s.sendall(b)
        s.shutdown(1)
    except OSError:
        pass
threading.Thread(target=up, daemon=True).start()
try:
    while True:
        b = s.recv(65536)
        if not b:
            break
        while b:
            b = b[os.write(1, b):]
except OSError:
    pass
os._exit(0)
"""

# socat and nc do not say whether they have reached the socket; what is not even a socket is told apart before.
_SHELL = """
if command -v python3 >/dev/null 2>&1; then exec python3 -IS -c {python} {path}; fi
if [ ! -S {path} ]; then echo agentqd-relay {enoent}; exit 1; fi
if command -v socat >/dev/null 2>&1; then echo agentqd-relay ok; exec socat -t 86400 - UNIX-CONNECT:{path}; fi
if command -v nc >/dev/null 2>&1; then echo agentqd-relay ok; exec nc -N -U {path}; fi
echo agentqd-relay {no_program}
"""


def relay_command(path: str) -> str:
    """One command line for the user's login shell, whichever that is."""
    script = _SHELL.format(
        python=shlex.quote(_PYTHON), path=shlex.quote(path), enoent=errno.ENOENT, no_program=NO_PROGRAM
    )
    return f"exec /bin/sh -c {shlex.quote(script)}"


def parse_mark(line: bytes) -> int | None:
    """0 for `ok`, an errno (or NO_PROGRAM), None for a line that is not the relay's."""
    if not line.startswith(MARK):
        return None
    word = line[len(MARK) :].strip()
    if word == b"ok":
        return 0
    try:
        return int(word)
    except ValueError:
        return None
