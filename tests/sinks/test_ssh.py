"""The `ssh` sink against a real OpenSSH: cuts, sleep, host keys, full disks, and what a reader there may see."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from realsshd import RealSshd, real_sshd

from agentqd.core.settings import Sink as SinkSettings
from agentqd.sinks import sshlink
from agentqd.sinks.base import Deferred, Delivered, Delivery, Rejected
from agentqd.sinks.ssh import LINE_BYTES_MAX, SshSink

from .conformance import SECRET, Condition, delivery, ids, some, with_payload
from .conftest import SSH
from .sshadapters import SshAdapter

pytestmark = [pytest.mark.sshd, pytest.mark.xdist_group("sshd")]
files_only = pytest.mark.parametrize("peer", SSH[:1], indirect=True)
lines_only = pytest.mark.parametrize("peer", SSH[1:], indirect=True)


def sink_of(peer: SshAdapter) -> SshSink:
    made = peer.make()
    assert isinstance(made, SshSink)
    return made


async def one(sink: SshSink, item: Delivery) -> Deferred | Delivered | Rejected:
    (outcome,) = await sink.deliver([item])
    assert isinstance(outcome, Deferred | Delivered | Rejected)
    return outcome


def logins(sshd: RealSshd) -> int:
    return sshd.log_text().count("Accepted publickey")


# Cuts.


@pytest.mark.parametrize("at", [0, 1, 100_000, 262_200, 299_000])
async def test_cut_in_mid_file_nothing_is_seen_and_nothing_stays(peer: SshAdapter, at: int) -> None:
    sink, item = sink_of(peer), delivery(1, padding=300_000)
    peer.say(f"cut {at}")
    outcome = await one(sink, item)
    assert isinstance(outcome, Deferred)
    assert outcome.connection
    assert peer.received() == []
    peer.say("good")
    assert isinstance(await one(sink, item), Delivered)
    assert peer.received() == ids([item])
    assert peer.holds(item)
    assert peer.parts() == []
    await sink.close()


@files_only
async def test_the_answer_lost_after_the_rename_leaves_one_file_by_id(peer: SshAdapter) -> None:
    sink = sink_of(peer)
    for _ in range(10):
        peer.become(Condition.AMBIGUOUS)
        outcome = await one(sink, delivery(1))
        assert isinstance(outcome, Deferred)
        assert outcome.connection
    peer.say("good")
    assert isinstance(await one(sink, delivery(1)), Delivered)
    assert peer.received() == ids([delivery(1)]) * 11
    assert [path.name for path in peer.inbox.iterdir()] == [f"{delivery(1).delivery_id}.json"]
    await sink.close()


async def test_a_killed_sshd_is_a_connection_failure_and_the_next_try_finds_the_new_one(peer: SshAdapter, between: RealSshd) -> None:  # fmt: skip
    sink = sink_of(peer)
    assert isinstance(await one(sink, delivery(1)), Delivered)
    between.kill()
    try:
        for _ in range(2):
            outcome = await one(sink, delivery(2))
            assert isinstance(outcome, Deferred)
            assert outcome.connection
            assert "127.0.0.1" in outcome.reason
    finally:
        between.start()
    assert isinstance(await one(sink, delivery(2)), Delivered)
    assert peer.received() == ids(some(2))
    await sink.close()


# A peer asleep.


async def test_a_peer_that_falls_asleep_holds_nobody_for_longer_than_the_timeout(peer: SshAdapter, between: RealSshd) -> None:  # fmt: skip
    peer.step_s = 0.5
    sink = sink_of(peer)
    assert isinstance(await one(sink, delivery(1)), Delivered)
    between.pause()
    try:
        began = time.monotonic()
        outcome = await one(sink, delivery(2))
        assert time.monotonic() - began < 15
        assert isinstance(outcome, Deferred)
        assert outcome.connection
        assert "asleep" in outcome.reason
    finally:
        between.resume()
    assert isinstance(await one(sink, delivery(2)), Delivered)
    assert set(peer.received()) == set(ids(some(2)))
    await sink.close()


async def test_a_black_hole_at_login_ends_in_time(peer: SshAdapter, between: RealSshd, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(sshlink, "LOGIN_S", 0.5)
    sink = sink_of(peer)
    between.pause()
    try:
        began = time.monotonic()
        outcome = await one(sink, delivery(1))
        assert time.monotonic() - began < 15
        assert isinstance(outcome, Deferred)
        assert outcome.connection
    finally:
        between.resume()
    await sink.close()


async def test_a_kept_connection_that_died_in_the_peers_sleep_costs_no_try(peer: SshAdapter, between: RealSshd, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(sshlink, "_BELIEVED_S", 0.0)
    monkeypatch.setattr(sshlink, "_LOOK_S", 0.3)
    sink = sink_of(peer)
    assert isinstance(await one(sink, delivery(1)), Delivered)
    asleep = between.sessions()
    between.pause(listener=False)
    assert isinstance(await one(sink, delivery(2)), Delivered)
    assert set(between.sessions()) - set(asleep)
    await sink.close()
    between.kill_sessions()


@contextmanager
def dropped(port: int) -> Iterator[None]:
    """Every packet to and from this port of loopback is dropped: no answer, no refusal."""
    rules = [["-i", "lo", "-p", "tcp", way, str(port), "-j", "DROP"] for way in ("--dport", "--sport")]
    for rule in rules:
        subprocess.run(["iptables", "-w", "-I", "INPUT", *rule], check=True)
    try:
        yield
    finally:
        for rule in rules:
            subprocess.run(["iptables", "-w", "-D", "INPUT", *rule], check=True)


@pytest.mark.root
@pytest.mark.skipif(shutil.which("iptables") is None, reason="needs iptables")
async def test_dropped_packets_in_mid_transfer_and_at_login_hold_nobody_for_long(peer: SshAdapter, between: RealSshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    peer.step_s = 1.0
    sink = sink_of(peer)
    content = os.urandom(30_000_000)
    blob = tmp_path / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    plain = delivery(1)
    item = Delivery(**{**{f: getattr(plain, f) for f in Delivery.__struct_fields__}, "blob_path": str(blob)})
    sending = asyncio.ensure_future(one(sink, item))
    async with asyncio.timeout(20):
        while not any(path.stat().st_size > 1_000_000 for path in peer.parts()):
            assert not sending.done(), sending.result()
            await asyncio.sleep(0.002)
    with dropped(between.port), monkeypatch.context() as patched:
        patched.setattr(sshlink, "LOGIN_S", 1.0)
        began = time.monotonic()
        for outcome in (await sending, await one(sink, item)):
            assert isinstance(outcome, Deferred)
            assert outcome.connection
        assert time.monotonic() - began < 20
    assert peer.received() == []
    assert isinstance(await one(sink, item), Delivered)
    assert peer.received() == ids([item])
    assert peer.parts() == []
    await sink.close()
    between.kill_sessions()


# The connection is kept for a while.


async def test_one_login_serves_many_entries_and_an_idle_connection_is_closed(peer: SshAdapter, between: RealSshd, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    sink, before = sink_of(peer), logins(between)
    for item in some(5):
        assert isinstance(await one(sink, item), Delivered)
    assert logins(between) == before + 1
    monkeypatch.setattr(sshlink, "IDLE_S", 0.05)
    assert isinstance(await one(sink, delivery(6)), Delivered)
    async with asyncio.timeout(10):
        while between.sessions():
            await asyncio.sleep(0.01)
    assert isinstance(await one(sink, delivery(7)), Delivered)
    assert logins(between) == before + 2
    await sink.close()


# Host keys, as strict as OpenSSH.


@files_only
@pytest.mark.parametrize("what", ["unknown", "changed", "revoked", "no file", "of the address only"])
async def test_a_host_key_that_is_not_known_is_refused_and_told_once(peer: SshAdapter, between: RealSshd, tmp_path: Path, what: str) -> None:  # fmt: skip
    right = peer.known_hosts.read_text()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    other = " ".join((tmp_path / "other.pub").read_text().split()[:2])
    place = right.split()[0]
    peer.known_hosts.write_text({"unknown": f"elsewhere {other}\n", "changed": f"{place} {other}\n", "revoked": f"{right}@revoked {right}", "no file": "", "of the address only": right}[what])  # fmt: skip
    if what == "no file":
        peer.known_hosts.unlink()
    sink = sink_of(peer)
    if what == "of the address only":
        sink._link._host = "localhost"
    for _ in range(3):
        outcome = await one(sink, delivery(1))
        assert isinstance(outcome, Deferred)
        assert outcome.connection
        word = {"changed": "CHANGED", "revoked": "revoked"}.get(what, "unknown")
        assert word in outcome.reason
        assert "ssh-key" in outcome.reason or what == "revoked"
    assert len(sink.notices) == 1
    assert list(peer.inbox.iterdir()) == []
    peer.known_hosts.write_text(right.replace("[127.0.0.1]", "[localhost]") if "address" in what else right)
    assert isinstance(await one(sink, delivery(1)), Delivered)
    peer.known_hosts.write_text("")
    await sink.close()
    await one(sink, delivery(2))
    assert len(sink.notices) == 2, "another trouble is told again"
    await sink.close()


@files_only
async def test_a_server_that_comes_back_with_another_host_key_gets_nothing(peer: SshAdapter) -> None:
    with real_sshd() as sshd:
        settings = peer.settings()
        peer.known_hosts.write_text(sshd.known_hosts_line())
        sink = _with(peer, port=sshd.port, identity_file=str(sshd.client_key))
        assert isinstance(await one(sink, delivery(1)), Delivered)
        sshd.kill()
        sshd.new_host_key()
        sshd.start()
        assert isinstance(await one(sink, delivery(2)), Deferred)  # cut, or refused already
        outcome = await one(sink, delivery(2))
        assert isinstance(outcome, Deferred)
        assert "CHANGED" in outcome.reason
        assert "ssh-keygen -R" in outcome.reason
        await sink.close()
    assert settings.path == str(peer.inbox)
    assert len(list(peer.inbox.iterdir())) == 1


@files_only
async def test_hashed_and_broken_lines_of_known_hosts_are_read_as_openssh_does(peer: SshAdapter) -> None:
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(peer.known_hosts)], check=True, capture_output=True)
    assert peer.known_hosts.read_text().startswith("|1|")
    broken = "# note\n\nnonsense\n@marker x y z\nhost ssh-ed25519 AAAA!\n"
    peer.known_hosts.write_text(broken + peer.known_hosts.read_text())
    sink = sink_of(peer)
    assert isinstance(await one(sink, delivery(1)), Delivered)
    await sink.close()


# Keys.


def _with(peer: SshAdapter, **changed: object) -> SshSink:
    fields = {name: getattr(peer.settings(), name) for name in SinkSettings.__struct_fields__}
    peer.settings = lambda: SinkSettings(**{**fields, **changed})  # type: ignore[method-assign,arg-type]
    return sink_of(peer)


@files_only
@pytest.mark.parametrize(("what", "said"), [("open", "chmod 600"), ("missing", "cannot be read"), ("passphrase", "passphrase"), ("garbage", "no private key"),
                                             ("fifo", "regular file"), ("foreign", "accepts no key")])  # fmt: skip
async def test_a_private_key_that_cannot_or_must_not_be_used_says_why(peer: SshAdapter, tmp_path: Path, what: str, said: str) -> None:  # fmt: skip
    path = tmp_path / "key"
    if what == "fifo":
        os.mkfifo(path, 0o600)
    elif what in ("passphrase", "foreign"):
        word = "s3cret" if what == "passphrase" else ""
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", word, "-f", str(path)], check=True)
    elif what != "missing":
        path.write_bytes(b"s3cret" if what == "garbage" else Path(str(peer.server.client_key)).read_bytes())
        path.chmod(0o644 if what == "open" else 0o600)
    sink = _with(peer, identity_file=str(path))
    outcome = await one(sink, delivery(1))
    assert isinstance(outcome, Deferred)
    assert outcome.connection
    assert said in outcome.reason
    assert "s3cret" not in outcome.reason
    assert SECRET not in outcome.reason
    await sink.close()


# What a reader there sees.


@lines_only
async def test_a_torn_line_of_a_full_disk_is_closed_before_the_next(peer: SshAdapter) -> None:
    sink = sink_of(peer)
    assert isinstance(await one(sink, delivery(1)), Delivered)
    with peer.path.open("ab") as file:
        file.write(b'{"torn":')
    assert isinstance(await one(sink, delivery(2)), Delivered)
    first, torn, second = peer.path.read_bytes().splitlines()
    assert torn == b'{"torn":'
    assert [json.loads(line)["id"] for line in (first, second)] == ids(some(2))
    await sink.close()


@lines_only
@pytest.mark.parametrize("over", [0, 1])
async def test_a_line_of_16_kib_is_one_write_and_a_longer_one_names_its_file(
    peer: SshAdapter, over: int
) -> None:
    bare = len(delivery(1).payload)
    item = delivery(1, padding=LINE_BYTES_MAX - 1 - bare + over)
    sink = sink_of(peer)
    assert isinstance(await one(sink, item), Delivered)
    line = peer.path.read_bytes()
    if over:
        said = json.loads(line)
        assert said == {"specversion": "1.0", "id": item.delivery_id, "type": item.type, "dataref": f"queue.jsonl.{item.delivery_id}.json"}  # fmt: skip
        assert (peer.inbox / said["dataref"]).read_bytes() == item.payload
    else:
        assert len(line) == LINE_BYTES_MAX
        assert line == item.payload + b"\n"
    await sink.close()


@lines_only
@pytest.mark.real
async def test_three_boxes_that_append_at_once_damage_no_line(peer: SshAdapter) -> None:
    sinks = [sink_of(peer) for _ in range(3)]

    async def feed(n: int) -> None:
        for number in range(40):
            item = delivery(n * 1000 + number, padding=12_000)
            assert isinstance(await one(sinks[n], item), Delivered)

    await asyncio.gather(*(feed(n) for n in range(3)))
    wanted = {delivery(n * 1000 + number).delivery_id for n in range(3) for number in range(40)}
    assert set(peer.received()) == wanted
    assert len(peer.received()) == 120
    for sink in sinks:
        await sink.close()


async def test_large_content_comes_as_a_file_before_its_envelope(peer: SshAdapter, tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    blob = tmp_path / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    plain = delivery(1)
    item = Delivery(**{**{f: getattr(plain, f) for f in Delivery.__struct_fields__}, "blob_path": str(blob)})
    sink = sink_of(peer)
    assert isinstance(await one(sink, item), Delivered)
    (there,) = [path for path in peer.inbox.iterdir() if path.name.endswith(".content")]
    assert item.delivery_id in there.name
    assert there.read_bytes() == content
    assert peer.received() == ids([item])
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    outcome = await one(sink, item)
    assert isinstance(outcome, Rejected)
    assert "sha256" in outcome.reason
    assert there.read_bytes() == content, "what is damaged never gets a name"
    assert not peer.parts()
    blob.unlink()
    outcome = await one(sink, item)
    assert isinstance(outcome, Rejected)
    assert "is gone" in outcome.reason
    assert peer.received() == ids([item])
    await sink.close()


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "", ".", "x\x00y", "é", "x" * 200])
@files_only
async def test_an_id_that_is_no_file_name_is_never_sent(peer: SshAdapter, name: str) -> None:
    sink = sink_of(peer)
    bad = with_payload(b"{}")
    outcome = await one(sink, Delivery(name, *[getattr(bad, f) for f in Delivery.__struct_fields__[1:]]))
    assert isinstance(outcome, Rejected)
    assert list(peer.inbox.iterdir()) == []
    await sink.close()


async def test_nothing_is_seen_or_answered_before_it_is_on_the_disk(peer: SshAdapter) -> None:
    sink = sink_of(peer)
    assert isinstance(await one(sink, delivery(1)), Delivered)
    (peer.base / "operations").unlink()
    assert isinstance(await one(sink, delivery(2, padding=15_000)), Delivered)
    said = (peer.base / "operations").read_text().split()
    if peer.mode == "append":
        assert said == ["open", "write", "fsync", "close"], "one write"
    else:
        assert said == ["open", "write", "fsync", "close", "posix-rename", "open", "fsync", "close"]
    await sink.close()


async def test_files_are_the_owners_only(peer: SshAdapter) -> None:
    sink = sink_of(peer)
    assert isinstance(await one(sink, delivery(1, padding=20_000)), Delivered)
    assert {path.stat().st_mode & 0o777 for path in peer.inbox.iterdir()} == {0o600}
    await sink.close()


@pytest.mark.root
async def test_a_full_disk_there_is_later_and_leaves_nothing_that_keeps_it_full(peer: SshAdapter) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(peer.inbox)], check=True)
    try:
        sink = sink_of(peer)
        assert isinstance(await one(sink, delivery(1)), Delivered)
        outcome = await one(sink, delivery(2, padding=400_000))
        assert isinstance(outcome, Deferred)
        assert not outcome.connection, "the peer is there: no reason to rest"
        assert "disk full" in outcome.reason
        assert peer.parts() == []
        async with asyncio.timeout(10):  # the server still has the removed file open for a moment
            while os.statvfs(peer.inbox).f_bavail * 4096 < 200_000:
                await asyncio.sleep(0.01)
        (peer.inbox / "filler").write_bytes(b"x" * (os.statvfs(peer.inbox).f_bavail * 4096))
        for item in (delivery(3, padding=9000), delivery(3, padding=9000)):
            assert isinstance(await one(sink, item), Deferred)
        (peer.inbox / "filler").unlink()
        assert isinstance(await one(sink, delivery(3, padding=9000)), Delivered)
        assert delivery(3, padding=9000).payload in b"".join(
            path.read_bytes() for path in peer.inbox.iterdir()
        )
        assert peer.parts() == []
        await sink.close()
    finally:
        subprocess.run(["umount", "-l", str(peer.inbox)], check=True)


@files_only
async def test_a_server_that_cannot_fsync_is_not_believed(
    peer: SshAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncssh

    async def no_fsync(self: object) -> None:
        raise asyncssh.SFTPOpUnsupported("fsync not supported by server")

    monkeypatch.setattr(asyncssh.SFTPClientFile, "fsync", no_fsync)
    sink = sink_of(peer)
    outcome = await one(sink, delivery(1))
    assert isinstance(outcome, Deferred)
    assert "fsync" in outcome.reason
    assert peer.received() == []
    await sink.close()


@pytest.fixture(autouse=True)
def nothing_printed(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    gc.collect()  # what was left open is told now, of this test
    out, err = capfd.readouterr()
    assert SECRET not in out + err


def test_asyncssh_is_loaded_when_it_is_used_and_not_before() -> None:
    code = "import sys, agentqd.sinks.ssh, agentqd.daemon.main; print('asyncssh' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "False\n"
