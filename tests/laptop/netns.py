"""A box behind a network that can fail: two namespaces, so that what is dropped is lost on the way and neither end is told.

    here ──veth── router (drops, slows down) ──veth── box (sshd runs there)

    with network() as net:
        with one_laptop(place=net.place) as one: ...
        net.lose(0.3); net.black_hole(); net.link_down(); net.heal()

Only namespaces and links that are made here are touched; all of them carry our pid in their names and are gone afterwards.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from realsshd import Place

NEEDED = {"ip": "iproute2", "tc": "iproute2", "iptables": "iptables"}
RATE = "64mbit"  # slow enough that a transfer of some megabytes can be met in its middle
RTO_MIN = "20ms"  # a lost packet is sent again soon (200 ms else): the tests wait less, nothing else changes
NETS = 1 << 14  # of 8 addresses each in 198.18.0.0/15, which RFC 2544 keeps for tests of networks


class Network:
    """The way between this machine and an address `host` behind a router."""

    def __init__(self) -> None:
        pid = os.getpid()
        self.router, self.box = f"aqr{pid}", f"aqb{pid}"
        self.link = f"aql{pid}"  # our end of the way
        self._inner = f"aqi{pid}"
        first = pid % NETS * 8
        self._near, self._router_near, self._router_far, self.host = (
            f"198.{18 + (first + at) // 65536}.{(first + at) // 256 % 256}.{(first + at) % 256}"
            for at in (1, 2, 5, 6)
        )

    @property
    def place(self) -> Place:
        return Place(self.host, ("ip", "netns", "exec", self.box))

    def make(self) -> None:
        for name in (self.router, self.box):
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "link", "add", self.link, "type", "veth", "peer", "name", "near", "netns", self.router)
        _run("ip", "-n", self.router, "link", "add", "far", "type", "veth", "peer", "name", self._inner)
        _run("ip", "-n", self.router, "link", "set", self._inner, "netns", self.box)
        ends = [
            ([], self.link, self._near),
            (["-n", self.router], "near", self._router_near),
            (["-n", self.router], "far", self._router_far),
            (["-n", self.box], self._inner, self.host),
        ]
        for where, link, address in ends:
            _run("ip", *where, "addr", "add", f"{address}/30", "dev", link)
            # Real packets, not bundles of 64 KiB that are lost as one.
            _run("ip", *where, "link", "set", link, "gso_max_segs", "1", "up")
        _run("ip", "-n", self.box, "route", "add", "default", "via", self._router_far, "rto_min", RTO_MIN)
        self._in_router("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        for link in ("near", "far"):
            bucket = ("root", "tbf", "rate", RATE, "burst", "64kb", "latency", "100ms")
            _run("tc", "-n", self.router, "qdisc", "add", "dev", link, *bucket)
        self._route()

    def remove(self) -> None:
        for words in (
            ("link", "del", self.link),
            ("netns", "del", self.router),
            ("netns", "del", self.box),
        ):
            subprocess.run(["ip", *words], check=False, capture_output=True)

    def lose(self, probability: float) -> None:
        """So many of the packets, in both directions."""
        chance = ("-m", "statistic", "--mode", "random", "--probability", str(probability))
        self._in_router("iptables", "-A", "FORWARD", *chance, "-j", "DROP")

    def black_hole(self, port: int | None = None) -> None:
        """Every packet; with `port` only those of the connection from this port of ours."""
        if port is None:
            self._in_router("iptables", "-A", "FORWARD", "-j", "DROP")
            return
        for side in ("--sport", "--dport"):
            self._in_router("iptables", "-A", "FORWARD", "-p", "tcp", side, str(port), "-j", "DROP")

    def link_down(self) -> None:
        _run("ip", "link", "set", self.link, "down")

    def heal(self) -> None:
        """As at the beginning."""
        self._in_router("iptables", "-F", "FORWARD")
        _run("ip", "link", "set", self.link, "up")
        self._route()

    def dropped(self) -> int:
        """Packets that the router has dropped since the last heal."""
        shown = self._in_router("iptables", "-nvxL", "FORWARD").splitlines()[2:]
        return sum(int(line.split()[0]) for line in shown)

    def received(self) -> int:
        """Bytes that have come to us this way, ever."""
        return self._counter("rx_bytes")

    def sent(self) -> int:
        return self._counter("tx_bytes")

    def _counter(self, name: str) -> int:
        return int(Path(f"/sys/class/net/{self.link}/statistics/{name}").read_text())

    def _route(self) -> None:
        """A link that goes down takes its routes with it."""
        _run(
            "ip",
            "route",
            "replace",
            f"{self.host}/32",
            "via",
            self._router_near,
            "dev",
            self.link,
            "rto_min",
            RTO_MIN,
        )

    def _in_router(self, *words: str) -> str:
        return _run("ip", "netns", "exec", self.router, *words)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Skips with the reason where a tool or the right to make a namespace is missing."""
    for tool, package in NEEDED.items():
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} (Debian: {package})")
    net = Network()
    probe = subprocess.run(
        ["ip", "netns", "add", net.router], capture_output=True, text=True, timeout=20, check=False
    )
    if probe.returncode != 0:
        pytest.skip(f"may not make a network namespace here: {probe.stderr.strip()[-200:]}")
    subprocess.run(["ip", "netns", "del", net.router], check=True, timeout=20)
    try:
        net.make()
        yield net
    finally:
        net.remove()
