"""What a plug has noticed besides its outcomes (a file replaced, a host key changed) becomes an alert."""

from __future__ import annotations

from agentqd.core.settings import Sink as SinkSettings
from agentqd.loops.alerts import alert
from agentqd.loops.box import Box
from agentqd.sinks.base import Sink
from agentqd.sinks.secretfile import open_to_all
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


def tell_open_secrets(box: Box, name: str, settings: SinkSettings) -> None:
    """A secret that every user of the machine can read is used, and told: in the log, and once as an alert."""
    told = [path for path in secret_files(settings) if open_to_all(path)]
    if not told:
        return

    def unit(tx: Transaction) -> None:
        for path in told:
            text = f"{name}: the secret file {path} is open to every user of this machine; chmod 600 it"
            alert(tx, box, "secret_file", text, key=f"{name}:{path}", group=name, sink=name)

    for path in told:
        box.log.warning("secret_file_open", sink=name, file=path)
    box.journal.submit(unit)
