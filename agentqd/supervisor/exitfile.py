"""exit.json: the record of an attempt's end, written when its whole tree is gone. Its content is a wire `Exited`.

No fsync: a crash of the machine kills the worker too, and an attempt without exit.json is then `lost`, never success.
"""

from __future__ import annotations

import msgspec

from agentqd.supervisor.limits import EXIT_FILE_BYTES_MAX
from agentqd.supervisor.wire import Exited
from agentqd.system.fsops import read_file_at, replace_file_at

NAME = "exit.json"
_decoder = msgspec.json.Decoder(Exited)
_encoder = msgspec.json.Encoder()


def write_exit(folder_fd: int, exited: Exited) -> None:
    """Whole or not at all. Raises OSError."""
    replace_file_at(NAME, ".exit.json.tmp", folder_fd, _encoder.encode(exited) + b"\n")


def read_exit(folder_fd: int) -> Exited | None:
    """What an attempt's folder says about its end; None if there is nothing usable."""
    try:
        return _decoder.decode(read_file_at(NAME, folder_fd, EXIT_FILE_BYTES_MAX))
    except (OSError, msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError):
        return None
