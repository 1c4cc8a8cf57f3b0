"""Entries too large for their envelope, over HTTP: their content in the place of a path that means nothing there."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks import Webhook

from agentqd.core.envelope import delivery_id, seal
from agentqd.core.units import Duration
from agentqd.sinks.base import Deferred, Delivered, Delivery, Rejected
from agentqd.sinks.largebody import LargeBody
from agentqd.sinks.signing import Signer, signature

from .conformance import NOW_US
from .httpreceiver import Exchange, Receiver, good, read_head, says
from .test_webhook import sink_to, until, web
from .webadapter import SECRET_LINE, keep_secret

pytestmark = pytest.mark.slow


__all__ = ["web"]
KEY = base64.b64decode(SECRET_LINE.removeprefix("whsec_"))


def large(folder: Path, content: bytes, key: str = "data.bin", **changed: Any) -> Delivery:
    """As loops/dropfolder.py makes it."""
    path = folder / "blob \u00e9\"'"
    path.write_bytes(content)
    data = {
        "task_id": "t1",
        "name": "a task",
        "attempt": 1,
        "key": key,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        **changed,
        "path": str(path),
    }
    entry_id = delivery_id("state", "t1", 1, "entry", key)
    payload = seal(entry_id, "agentq.task.entry", "box", "t1", NOW_US, data)
    return Delivery(
        entry_id, 1, "agentq.task.entry", "entry", key, "t1", payload, NOW_US, 0, blob_path=str(path)
    )


def content_of(body: bytes) -> bytes:
    data = json.loads(body)["data"]
    assert "path" not in data
    text = data.get("content")
    return base64.b64decode(data["content_base64"], validate=True) if text is None else text.encode()


@pytest.mark.parametrize(
    "content",
    [
        os.urandom(700_001), ('é\u2028\x00"\\\n\U0001f600' * 40_000).encode(), b'{"a": 1}' * 50_000, b"x" * 600_000 + b"\xff", b"x" * 600_000 + "é".encode()[:1],
        b"\x01" * 600_000, b"",
    ],
    ids=["binary", "text", "json", "text and one byte", "a character cut", "control characters", "nothing"],
)  # fmt: skip
async def test_the_content_itself_goes_out_signed_and_the_same_at_each_try(
    web: Receiver, tmp_path: Path, content: bytes
) -> None:
    web.plan = [says(500)]
    sent = large(tmp_path, content)
    async with sink_to(web.url, secret_file=keep_secret(tmp_path / "s")) as sink:
        assert isinstance((await sink.deliver([sent]))[0], Deferred)
        assert await sink.deliver([sent]) == [Delivered()]
    first, second = web.seen
    for request in (first, second):
        assert content_of(request.body) == content
        assert json.loads(request.body)["data"]["sha256"] == hashlib.sha256(content).hexdigest()
        assert Webhook(SECRET_LINE).verify(request.body, request.headers)["id"] == sent.delivery_id
    assert first.body == second.body


async def test_what_stands_behind_the_path_stays_there(web: Receiver, tmp_path: Path) -> None:
    """Attachments of a mail; one may be the very file that the entry is."""
    sent = large(tmp_path, b"x" * 300_000)
    named = b'"path":' + msgspec.json.encode(sent.blob_path)
    payload = sent.payload.replace(named + b"}}", named + b',"attachments":[{' + named + b"}]}}")
    async with sink_to(web.url) as sink:
        assert await sink.deliver([msgspec.structs.replace(sent, payload=payload)]) == [Delivered()]
    data = json.loads(web.seen[0].body)["data"]
    assert data["content"] == "x" * 300_000
    assert data["attachments"] == [{"path": sent.blob_path}]


@settings(max_examples=40)
@given(content=st.binary(max_size=3000) | st.text(max_size=3000).map(lambda text: text.encode("utf-8", "replace")), chunk=st.integers(1, 50))  # fmt: skip
def test_the_pieces_are_the_envelope_with_the_content_in_it_wherever_they_are_cut(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, chunk: int
) -> None:
    from agentqd.sinks import largebody

    folder = tmp_path_factory.mktemp("large")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(largebody, "_CHUNK_BYTES", 3 * chunk)
        sent = large(folder, content)
        assert sent.blob_path is not None
        body = LargeBody(sent.payload, sent.blob_path)

        async def all_of_it() -> tuple[str, bytes]:
            signed = await body.prepare(lambda: Signer([KEY, b"2"], "d1", 7))
            return signed, b"".join([piece async for piece in body.pieces()])

        signed, whole = asyncio.run(all_of_it())
    assert len(whole) == body.length
    assert content_of(whole) == content
    assert signed == signature([KEY, b"2"], "d1", 7, whole)
    envelope, stored = json.loads(whole), json.loads(sent.payload)
    del stored["data"]["path"]
    envelope["data"].pop("content", None) or envelope["data"].pop("content_base64", None)
    assert envelope == stored


@pytest.mark.parametrize(
    "harm",
    ["changed", "shorter", "longer", "another sha256"],
)
async def test_a_damaged_content_is_rejected_and_never_sent(web: Receiver, tmp_path: Path, harm: str) -> None:
    content = os.urandom(600_000)
    sent = large(tmp_path, content, **({"sha256": "0" * 64} if harm == "another sha256" else {}))
    assert sent.blob_path is not None
    with open(sent.blob_path, "r+b") as file:
        if harm == "changed":
            file.seek(300_000)
            file.write(b"!?!?")
        elif harm == "shorter":
            file.truncate(599_999)
        elif harm == "longer":
            file.seek(0, 2)
            file.write(b"x")
    async with sink_to(web.url) as sink:
        (outcome,) = await sink.deliver([sent])
    assert isinstance(outcome, Rejected)
    assert "does not match its sha256" in outcome.reason
    assert web.connections == 0


async def test_a_content_that_changes_while_it_is_sent_never_arrives_whole(
    web: Receiver, tmp_path: Path
) -> None:
    sent = large(tmp_path, os.urandom(20_000_000))
    got = bytearray()
    ended = asyncio.Event()

    async def slow(x: Exchange) -> None:
        request = await read_head(x.reader)
        length = int(request.headers["content-length"])
        assert sent.blob_path is not None
        with open(sent.blob_path, "r+b") as file:
            file.seek(19_000_000)
            file.write(b"!?!?")
        while chunk := await x.reader.read(65536):
            got.extend(chunk)
        assert len(got) < length
        ended.set()

    from .httpreceiver import early

    web.does = early(slow)
    async with sink_to(web.url) as sink:
        (outcome,) = await sink.deliver([sent])
    assert isinstance(outcome, Rejected)
    await asyncio.wait_for(ended.wait(), 10)


@pytest.mark.parametrize(
    "payload",
    [b'{"data":{"path":"/elsewhere"}}', b'{"data":{"sha256":1,"path":%s}}', b'{"data":{"path":%s}}'],
)
async def test_an_envelope_that_does_not_name_its_file_is_rejected(
    web: Receiver, tmp_path: Path, payload: bytes
) -> None:
    sent = large(tmp_path, b"x")
    if b"%s" in payload:
        payload %= msgspec.json.encode(sent.blob_path)
    async with sink_to(web.url) as sink:
        (outcome,) = await sink.deliver([msgspec.structs.replace(sent, payload=payload)])
    assert isinstance(outcome, Rejected)
    assert web.connections == 0


async def test_a_content_that_cannot_be_read_is_later(web: Receiver, tmp_path: Path) -> None:
    sent = large(tmp_path, b"x" * 300_000)
    assert sent.blob_path is not None
    os.rename(sent.blob_path, tmp_path / "aside")
    os.symlink(tmp_path / "aside", sent.blob_path)
    async with sink_to(web.url) as sink:
        (outcome,) = await sink.deliver([sent])
        assert isinstance(outcome, Deferred)
        assert not outcome.connection
        os.unlink(sent.blob_path)
        (outcome,) = await sink.deliver([sent])
        assert isinstance(outcome, Deferred)
        assert "No such file" in outcome.reason
        os.rename(tmp_path / "aside", sent.blob_path)
        assert await sink.deliver([sent]) == [Delivered()]


async def test_a_slow_receiver_has_the_timeout_for_each_piece_and_not_for_all(
    web: Receiver, tmp_path: Path
) -> None:
    sent = large(tmp_path, os.urandom(6_000_000))

    async def slow(x: Exchange) -> None:
        x.reader._limit = 2**16  # what waits here has been taken
        x.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        request = await read_head(x.reader)
        left = int(request.headers["content-length"])
        while left:
            left -= len(await x.reader.read(min(left, 100_000)))
            await asyncio.sleep(0.02)
        await x.answer(200)

    from .httpreceiver import early

    web.does = early(slow)
    async with sink_to(web.url, timeout=Duration(0.7)) as sink:
        began = time.monotonic()
        assert await sink.deliver([sent]) == [Delivered()]
        assert time.monotonic() - began > 0.9


async def test_it_can_be_cancelled_while_it_is_signed_and_while_it_is_sent(
    web: Receiver, tmp_path: Path
) -> None:
    sent = large(tmp_path, os.urandom(30_000_000))

    async def never(x: Exchange) -> None:
        await read_head(x.reader)
        await asyncio.Event().wait()

    from .httpreceiver import early

    async with sink_to(web.url, secret_file=keep_secret(tmp_path / "s")) as sink:
        task = asyncio.ensure_future(sink.deliver([sent]))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert web.connections == 0
        web.does = early(never)
        task = asyncio.ensure_future(sink.deliver([sent]))
        await until(lambda: web.connections == 1)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        web.does = good
        assert await sink.deliver([sent]) == [Delivered()]
    await until(
        lambda: not any(sent.blob_path in os.readlink(f"/proc/self/fd/{fd}") for fd in _descriptors())
    )  # type: ignore[operator]


def _descriptors() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


_SENDER = """
import asyncio, resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.sinks.test_webhook_large import large, sink_to
async def main():
    folder = Path(sys.argv[2])
    import msgspec
    from agentqd.sinks.base import Delivery
    sent = msgspec.json.decode((folder / "delivery").read_bytes(), type=Delivery)
    small = large(folder, b"x")
    async with sink_to(sys.argv[3], secret_file=sys.argv[4]) as sink:
        await sink.deliver([small])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcomes = await sink.deliver([sent])
        print(outcomes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
asyncio.run(main())
"""


async def test_100_mb_are_sent_in_a_few_mib_of_memory(web: Receiver, tmp_path: Path) -> None:
    """The sender is a process of its own; the receiver keeps the body, verifies it and compares the content's sha256."""
    (tmp_path / "big").mkdir()
    content = os.urandom(1_000_000) * 100
    sent = large(tmp_path / "big", content)
    (tmp_path / "delivery").write_bytes(msgspec.json.encode(sent))
    sums: list[tuple[str, bytes, dict[str, str]]] = []

    async def keeps_sums(x: Exchange) -> None:
        """Nothing of this size is kept: HMAC and the content's digest are made as it comes."""
        request = await read_head(x.reader)
        left = int(request.headers["content-length"])
        mac = hmac.new(KEY, f"{request.id}.{request.headers['webhook-timestamp']}.".encode(), "sha256")
        body = bytearray()
        while left:
            chunk = await x.reader.readexactly(min(left, 2**19))
            mac.update(chunk)
            body += chunk
            left -= len(chunk)
        sums.append((base64.b64encode(mac.digest()).decode(), bytes(body), request.headers))
        await x.answer(200, "Connection: close")
        await x.close()

    from .httpreceiver import early

    web.does = early(keeps_sums)
    root = Path(__file__).parent.parent.parent
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _SENDER, str(root), str(tmp_path), web.url, keep_secret(tmp_path / "s"), stdout=subprocess.PIPE
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    outcomes, _, grown = out.decode().rpartition(" ")
    assert outcomes.startswith("[Delivered("), out
    assert int(grown) < 12_000, f"{grown} KiB more for a body of 133 MB"
    made, body, headers = sums[-1]
    assert headers["webhook-signature"] == f"v1,{made}"
    data = json.loads(body)["data"]
    assert hashlib.sha256(base64.b64decode(data["content_base64"])).hexdigest() == data["sha256"]
    assert data["sha256"] == hashlib.sha256(content).hexdigest()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
