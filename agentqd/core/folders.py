"""Where everything lies: the state folder, the runtime folder, and the well-known paths in them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Folders:
    """The two folders of one agentqd, as absolute or given paths without a trailing slash."""

    state: str
    runtime: str

    @property
    def queue(self) -> str:
        return f"{self.state}/queue"

    @property
    def queue_file(self) -> str:
        return f"{self.state}/queue/tasks.jsonl"

    @property
    def rejected(self) -> str:
        return f"{self.state}/queue/rejected.jsonl"

    @property
    def prompts(self) -> str:
        return f"{self.state}/prompts"

    @property
    def tasks(self) -> str:
        return f"{self.state}/tasks"

    @property
    def completions(self) -> str:
        return f"{self.state}/completions.jsonl"

    @property
    def journal(self) -> str:
        return f"{self.state}/journal.db"

    @property
    def state_id(self) -> str:
        return f"{self.state}/state_id"

    @property
    def daemon_lock(self) -> str:
        return f"{self.state}/agentqd.lock"

    @property
    def supervisor_lock(self) -> str:
        return f"{self.state}/supervisor.lock"

    @property
    def control_socket(self) -> str:
        return f"{self.runtime}/agentqd.sock"

    @property
    def supervisor_socket(self) -> str:
        return f"{self.runtime}/supervisor.sock"

    def attempt(self, task: str, attempt: int) -> str:
        """The folder of one attempt."""
        return f"{self.state}/tasks/{task}/attempt-{attempt}"


def choose_folders(
    env: Mapping[str, str], uid: int, state_dir: str | None = None, runtime_dir: str | None = None
) -> Folders:
    """An argument beats AGENTQD_STATE_DIR / AGENTQD_RUNTIME_DIR, which beat root's or the user's defaults.

    An empty value counts as not given; a relative XDG variable is ignored (as XDG asks).
    """
    state = _tidy(state_dir or env.get("AGENTQD_STATE_DIR") or _default_state(env, uid))
    chosen = runtime_dir or env.get("AGENTQD_RUNTIME_DIR")
    if chosen:
        return Folders(state, _tidy(chosen))
    if uid == 0:
        return Folders(state, "/run/agentqd")
    xdg = env.get("XDG_RUNTIME_DIR", "")
    return Folders(state, f"{_tidy(xdg)}/agentqd" if xdg.startswith("/") else f"{state}/run")


def _default_state(env: Mapping[str, str], uid: int) -> str:
    if uid == 0:
        return "/var/lib/agentqd"
    xdg = env.get("XDG_STATE_HOME", "")
    if xdg.startswith("/"):
        return f"{_tidy(xdg)}/agentqd"
    return f"{_tidy(env.get('HOME') or '/')}/.local/state/agentqd"


def _tidy(path: str) -> str:
    return path.rstrip("/") or "/"
