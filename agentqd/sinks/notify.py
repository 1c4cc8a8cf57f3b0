"""A short message to people, over any service that apprise knows (ntfy, Slack, Telegram, ...). Delivered means: every service
in `urls_file` has accepted it.

Promises:
1. The URLs carry tokens. They are read anew for each try and stand in no log, reason or answer: a service is called by its
   number in the file and its name. What apprise and its HTTP library log ends here; of it only a status code is kept.
2. A service that has accepted a message is not asked again while the others are tried again, over restarts too (`_Progress`).
3. Apprise blocks, and a call that hangs cannot be stopped: each has a thread of its own that keeps nobody from leaving, at
   most THREADS_MAX at once. When all of them hang, a try is deferred at once. A call that ends late still counts.
4. Of an answer over HTTP no more than a MiB is ever in memory (`briefanswers`); what it says after that is not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final

from agentqd.core.errors import ConfigError
from agentqd.sinks.base import Context, Deferred, Delivered, Delivery, Found, Outcome, Rejected
from agentqd.sinks.briefanswers import be_brief
from agentqd.sinks.notifytext import BODY_CHARS_MAX, Message, message_of
from agentqd.sinks.reason import bounded
from agentqd.sinks.secretfile import secret_lines

INSTALL: Final = "the notify sink needs apprise: pip install 'agentqd[notify]'"
TIMEOUT_S: Final = 30.0
CONCURRENCY: Final = 2
URLS_MAX: Final = 32
THREADS_MAX: Final = 16
REMEMBERED_MAX: Final = 1000
_SLACK_S: Final = 15.0  # beyond our own time limit, for the loop's
_ESCAPES: Final = 1.5  # a service's limit counts what HTML makes of a text
_LOGGERS: Final = ("apprise", "urllib3", "requests", "oauthlib", "requests_oauthlib", "paho", "slixmpp")
_STATUS: Final = re.compile(r"\berror=(\d{3})\b")
_DIGEST: Final = re.compile("[0-9a-f]{16}")
_TOO_MANY: Final = 429


class Answer:
    """What one service made of one message."""

    def __init__(self, *, accepted: bool, status: int | None = None, said: str = "") -> None:
        self.accepted = accepted
        self.status = status
        self.said = said  # ours, never the library's words


class NotifySink:
    batch_max = 1
    checks_content = True  # it sends none

    def __init__(self, context: Context) -> None:
        if not context.settings.urls_file:
            raise ConfigError(f"the sink {context.name} is of type notify and needs a urls_file")
        self._file = context.settings.urls_file
        self._try_s = float(context.settings.timeout or TIMEOUT_S)
        self.timeout_s = self._try_s + _SLACK_S
        self.concurrency = context.settings.concurrency or CONCURRENCY
        self._services: dict[str, Any] = {}  # by URL, made anew when the file changes
        self._progress = _Progress()
        self._calls = _Calls(f"sink-{context.name}")

    async def open(self, last_position: int) -> list[Found]:  # noqa: ARG002  (it keeps no positions)
        """Raises OSError without the library: `status` and `doctor` show it, the rows wait, and once it is installed they go."""
        try:
            await asyncio.to_thread(_load)
        except ImportError:
            raise OSError(INSTALL) from None
        return []

    async def deliver(self, batch: Sequence[Delivery]) -> Sequence[Outcome]:
        return [await self._deliver(delivery) for delivery in batch]

    async def close(self) -> None:
        """What hangs is left to itself; its answer is not waited for."""
        self._calls.join_ended()

    async def _deliver(self, delivery: Delivery) -> Outcome:
        try:
            message = message_of(delivery.payload, delivery.delivery_id, delivery.type)
        except ValueError as problem:
            return Rejected(str(problem))
        try:
            services = await asyncio.to_thread(self._read_services)
        except ConfigError as problem:
            return Deferred(bounded(problem.message))
        self._progress.recall(delivery.delivery_id, delivery.progress)
        if self._calls.all_hang:
            return Deferred(f"{THREADS_MAX} calls to services hang; none is added", connection=True)
        answers = await self._ask(delivery.delivery_id, message, services)
        refused = [(n, *each) for n, each in enumerate(answers, 1) if not each[1].accepted]
        if not refused:
            self._progress.forget(delivery.delivery_id)
            names = ", ".join(name for name, _ in answers)
            return Delivered(detail=bounded(names))
        return _deferred(refused, len(answers), self._progress.told(delivery.delivery_id))

    async def _ask(
        self, delivery_id: str, message: Message, services: dict[str, Any]
    ) -> list[tuple[str, Answer]]:
        """All services that have not accepted it yet, at once; within the time limit of one try."""
        pending = {}
        for url, service in services.items():
            key = (delivery_id, _digest(url))
            if not self._progress.accepted(key):
                pending[url] = asyncio.ensure_future(self._call(key, service, message))
        try:
            if pending:
                await asyncio.wait(pending.values(), timeout=self._try_s)
        finally:
            for task in pending.values():
                task.cancel()
        self._calls.note_hung({(delivery_id, _digest(url)) for url, task in pending.items() if not task.done()})  # fmt: skip
        late = Answer(accepted=False, said=f"no answer within {self._try_s:g} s")
        answers = []
        for url, service in services.items():
            if self._progress.accepted((delivery_id, _digest(url))):
                answer = Answer(accepted=True)
            else:
                task = pending[url]
                answer = task.result() if task.done() and not task.cancelled() else late
            answers.append((_name(service), answer))
        return answers

    async def _call(self, key: _Key, service: Any, message: Message) -> Answer:
        """One service's answer. A call of an earlier try that is still under way is waited for before another is made."""
        earlier = self._calls.under_way(key)
        if earlier is not None:
            answer = await asyncio.shield(earlier)
            if answer.accepted:
                return answer

        def told(answer: Answer) -> None:
            if answer.accepted:
                self._progress.note(key)

        return await asyncio.shield(await self._calls.begin(key, lambda: _notify(service, message), told))

    def _read_services(self) -> dict[str, Any]:
        """The file's services by URL, in its order. Raises ConfigError, which names no URL."""
        urls = list(dict.fromkeys(secret_lines(self._file)))
        if len(urls) > URLS_MAX:
            raise ConfigError(f"{self._file} holds {len(urls)} URLs; at most {URLS_MAX} are asked")
        if list(self._services) != urls:
            made = {}
            for n, url in enumerate(urls, 1):
                service = _service(url)
                if service is None:
                    raise ConfigError(
                        f"URL {n} of {len(urls)} in {self._file} is none that apprise understands; "
                        "https://github.com/caronc/apprise/wiki names them"
                    )
                made[url] = service
            self._services = made
        return self._services


_Key = tuple[str, str]  # delivery id, digest of the URL


class _Progress:
    """Which services have accepted what, of deliveries that others still owe an answer for. Kept with the row (`told`, `recall`), and
    here for what is accepted after a try was given up."""

    def __init__(self) -> None:
        self._accepted: OrderedDict[str, set[str]] = OrderedDict()

    def accepted(self, key: _Key) -> bool:
        return key[1] in self._accepted.get(key[0], ())

    def note(self, key: _Key) -> None:
        self._accepted.setdefault(key[0], set()).add(key[1])
        self._accepted.move_to_end(key[0])
        while len(self._accepted) > REMEMBERED_MAX:
            self._accepted.popitem(last=False)

    def recall(self, delivery_id: str, told: bytes | None) -> None:
        """What another type of sink has left there (the row was moved) says nothing of ours."""
        digests = (told or b"").decode("ascii", "replace").split()
        if all(map(_DIGEST.fullmatch, digests)):
            for digest in digests:
                self.note((delivery_id, digest))

    def told(self, delivery_id: str) -> bytes | None:
        """As the row keeps it."""
        return " ".join(sorted(self._accepted.get(delivery_id, ()))).encode() or None

    def forget(self, delivery_id: str) -> None:
        self._accepted.pop(delivery_id, None)


class _Calls:
    """Blocking calls, each in a thread of its own; used from the event loop only."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._slots = asyncio.Semaphore(THREADS_MAX)
        self._under_way: dict[_Key, asyncio.Future[Answer]] = {}
        self._hung: set[_Key] = set()
        self._threads: set[threading.Thread] = set()

    @property
    def all_hang(self) -> bool:
        return len(self._hung) >= THREADS_MAX

    def under_way(self, key: _Key) -> asyncio.Future[Answer] | None:
        return self._under_way.get(key)

    def note_hung(self, keys: set[_Key]) -> None:
        self._hung |= keys & self._under_way.keys()

    async def begin(
        self, key: _Key, job: Callable[[], Answer], told: Callable[[Answer], None]
    ) -> asyncio.Future[Answer]:
        """`told` is called when it ends, whether anybody still waits or not."""
        await self._slots.acquire()
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Answer] = loop.create_future()
        self._under_way[key] = ended

        def settle(answer: Answer) -> None:
            thread.join()
            self._threads.discard(thread)
            self._slots.release()
            self._hung.discard(key)
            del self._under_way[key]
            told(answer)
            ended.set_result(answer)

        def run() -> None:
            answer = job()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, answer)

        # A daemon thread: a service that hangs must not keep the process from leaving.
        thread = threading.Thread(target=run, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread left on this machine
            self._slots.release()
            del self._under_way[key]
            raise
        self._threads.add(thread)
        return ended

    def join_ended(self) -> None:
        for thread in self._threads:
            thread.join(0)


# The library.


def _load() -> None:
    """A quarter of a second, most of it for its services. Raises ImportError."""
    importlib.invalidate_caches()  # it may have been installed since
    _service("json://localhost")


def _apprise() -> Any:
    _mute()  # it speaks while it is loaded
    module = importlib.import_module("apprise")
    be_brief()
    _mute()  # whatever it has set up itself
    return module


def _mute() -> None:
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [_ears]
        logger.propagate = False
        logger.setLevel(logging.WARNING)


class _Ears(logging.Handler):
    """All that these libraries log ends here. Of what a thread hears in a call only what `heard` takes from it is kept."""

    def __init__(self) -> None:
        super().__init__()
        self._local = threading.local()

    def emit(self, record: logging.LogRecord) -> None:
        heard = getattr(self._local, "heard", None)
        if heard is None or len(heard) >= 20:
            return
        try:
            heard.append(record.getMessage())
        except Exception:  # noqa: BLE001 - a foreign format string
            return

    def listen(self) -> list[str]:
        self._local.heard = []
        return self._local.heard  # type: ignore[no-any-return]


_ears: Final = _Ears()


def _service(url: str) -> Any:
    """One service, or None."""
    apprise = _apprise()  # outside the `try`: its absence is told
    asset = apprise.AppriseAsset(
        app_id="agentqd", app_desc="agentqd", async_mode=False, storage_mode="memory", pgp_autogen=False, pem_autogen=False
    )  # fmt: skip
    try:
        service = apprise.Apprise.instantiate(url, asset=asset, suppress_exceptions=True)
        if service is None:
            return None
        if service.overflow_mode == apprise.OverflowMode.UPSTREAM:  # the URL may say another
            service.overflow_mode = apprise.OverflowMode.TRUNCATE
        alone = apprise.Apprise(asset=asset)
        return alone if alone.add(service) else None
    except Exception:  # noqa: BLE001 - its words may hold the URL
        return None


def _notify(service: Any, message: Message) -> Answer:
    """In a thread. Whatever it raises says nothing here but its type: the text may hold the URL."""
    heard = _ears.listen()
    try:
        accepted = service.notify(
            body=message.body(_room(service, message)),
            title=message.title,
            notify_type=message.mood,
            body_format="text",
        )
    except Exception as problem:  # noqa: BLE001 - code we do not own
        return Answer(accepted=False, said=type(problem).__name__)
    if accepted:
        return Answer(accepted=True)
    found = next((match for line in reversed(heard) if (match := _STATUS.search(line))), None)
    status = int(found[1]) if found is not None else None
    return Answer(accepted=False, status=status, said="no connection" if status is None else f"HTTP {status}")


def _room(service: Any, message: Message) -> int:
    plugin = service[0]
    room = int(plugin.body_maxlen or BODY_CHARS_MAX)
    if not plugin.title_maxlen:  # it becomes the body's first line
        room -= len(message.title) + 2
    return int(room / _ESCAPES) if str(getattr(plugin.notify_format, "value", plugin.notify_format)) == "html" else room  # fmt: skip


def _name(service: Any) -> str:
    return bounded(str(service[0].service_name or "service"))[:40]


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def _deferred(refused: list[tuple[int, str, Answer]], of: int, progress: bytes | None) -> Deferred:
    said = "; ".join(f"URL {n} of {of} ({name}): {answer.said}" for n, name, answer in refused)
    unreached = all(answer.status is None for _, _, answer in refused) and len(refused) == of
    busy = any(answer.status == _TOO_MANY for _, _, answer in refused)
    return Deferred(bounded(said), connection=unreached, busy=busy, progress=progress)
