"""What is noticed about sinks besides their outcomes becomes an alert: by a plug (a file replaced, a host key changed), and
secret files that lie open."""

from __future__ import annotations

from agentqd.core.settings import Sink as SinkSettings
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.sinks.base import Sink
from agentqd.sinks.secretfile import open_since_ns
from agentqd.storage.transaction import Transaction


def tell_notices(box: Box, name: str, plug: Sink) -> None:
    """Take the plug's `notices`, if it has any."""
    notices: list[str] | None = getattr(plug, "notices", None)
    if not notices:
        return
    told, notices[:] = list(notices), []
    at, kind = box.clock.now_us(), getattr(plug, "notice_kind", "sink_file")

    def unit(tx: Transaction) -> None:
        for n, text in enumerate(told):
            alert(tx, box, kind, f"{name}: {text}", key=f"{name}:{at}:{n}", group=name, sink=name)

    box.journal.submit(unit)


def secret_files(settings: SinkSettings) -> list[str]:
    """The files that a sink's secrets lie in."""
    several = settings.secret_file or []
    named = [several] if isinstance(several, str) else several
    return [*named, *(each for each in (settings.password_file, settings.urls_file) if each is not None)]


def open_secrets(settings: SinkSettings) -> dict[str, int]:
    """Of these, those that every user of this machine may read or write now, and when each was last changed (ns)."""
    found = {path: open_since_ns(path) for path in secret_files(settings)}
    return {path: since for path, since in found.items() if since is not None}


class SecretWatch:
    """A secret that every user of the machine can read is used, and told each time that it becomes so: in the log, and as an alert."""

    def __init__(self, box: Box) -> None:
        self._box = box
        self._told: set[tuple[str, str]] = set()  # (sink, file), as long as it is so

    async def look(self) -> None:
        """Called every few seconds: a `stat` of each file. Raises JournalError."""
        found = {
            (name, path): since
            for name, settings in self._box.settings.sinks.items()
            for path, since in open_secrets(settings).items()
        }
        fresh = sorted(found.keys() - self._told)
        if fresh:

            def unit(tx: Transaction) -> None:
                for name, path in fresh:
                    text = (
                        f"{name}: the secret file {path} is open to every user of this machine; chmod 600 it"
                    )
                    key = f"{name}:{path}:{found[name, path]}"  # the same after a restart
                    alert(tx, self._box, "secret_file", text, key=key, group=name, sink=name, file=path)

            for name, path in fresh:
                self._box.log.warning("secret_file_open", sink=name, file=path)
            await self._box.journal.commit(unit)
        self._told = set(found)
