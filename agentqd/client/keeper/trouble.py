"""What a keeper can say instead of an answer: `{"ok": false, "error": CODE, "message": ...}`."""

from __future__ import annotations

from typing import Any, Final

UNREACHABLE: Final = "unreachable"
HOST_KEY_UNKNOWN: Final = "host_key_unknown"
HOST_KEY_CHANGED: Final = "host_key_changed"
NOT_PERMITTED: Final = "not_permitted"
NO_DAEMON: Final = "no_daemon"
FORWARDING_FORBIDDEN: Final = "forwarding_forbidden"
NO_SFTP: Final = "no_sftp"
NO_FOLDER: Final = "no_folder"
DISK_FULL: Final = "disk_full"
STALE: Final = "stale"  # nothing was done; another keeper may be started at once
BAD_REQUEST: Final = "bad_request"
BOX_FAILED: Final = "box_failed"  # an operation on the box's disk failed for another reason


class Trouble(Exception):
    """An operation that failed, and why. `unknown` is set where it may have been done all the same."""

    def __init__(self, code: str, message: str, *, unknown: bool = False, **fields: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.unknown = unknown
        self.fields = fields

    def as_answer(self) -> dict[str, Any]:
        answer = {"ok": False, "error": self.code, "message": self.message, **self.fields}
        return {**answer, "unknown": True} if self.unknown else answer
