"""The floors of remote.py: the least that a program with asyncssh must do. Each run is one whole process.

`python -I bare_ssh.py PORT USER append FILE LINE` and `... get FILE TARGET`; keys and known_hosts are those of $HOME/.ssh.
"""

import asyncio
import sys

import asyncssh


async def append(port: int, user: str, path: str, line: str) -> None:
    """One line, one write on a handle opened for append, fsynced."""
    async with (
        asyncssh.connect("127.0.0.1", port, username=user) as connection,
        connection.start_sftp_client() as sftp,
        sftp.open(path, "ab") as file,
    ):
        await file.write(line.encode() + b"\n")
        await file.fsync()


async def get(port: int, user: str, path: str, target: str) -> None:
    """asyncssh's own transfer: many reads on their way at once; no sum, no fsync."""
    async with (
        asyncssh.connect("127.0.0.1", port, username=user) as connection,
        connection.start_sftp_client() as sftp,
    ):
        await sftp.get(path, target)


if __name__ == "__main__":
    what = {"append": append, "get": get}[sys.argv[3]]
    asyncio.run(what(int(sys.argv[1]), sys.argv[2], sys.argv[4], sys.argv[5]))
