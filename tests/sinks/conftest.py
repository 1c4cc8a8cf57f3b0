"""Fixtures of the append sinks' own tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from realsshd import RealSshd, real_sshd
from smtpserver import SmtpServer, smtp_server

from .adapters import APPENDING, AppendAdapter, CompletionsAdapter
from .smtpadapter import EmailAdapter
from .sshadapters import SshAdapter, SshAppendAdapter, sshd_with_between
from .webadapter import WebhookAdapter, receiver_process

SSH = [
    pytest.param(adapter, marks=[pytest.mark.sshd, pytest.mark.xdist_group("sshd")], id=f"ssh-{adapter.mode}")
    for adapter in (SshAdapter, SshAppendAdapter)
]


@pytest.fixture(scope="session")
def between() -> Iterator[RealSshd]:
    """One real sshd for all: its sessions go through sftp_between.py."""
    with real_sshd(start=False) as sshd:
        sshd_with_between(sshd)
        SshAdapter.server = sshd.start()
        yield sshd


@pytest.fixture(scope="session")
def smtpd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmtpServer]:
    """One real SMTP server for all."""
    with smtp_server(tmp_path_factory.mktemp("smtpd")) as server:
        EmailAdapter.server = server
        yield server


@pytest.fixture
def post(smtpd: SmtpServer, tmp_path: Path) -> Iterator[EmailAdapter]:
    (tmp_path / "base").mkdir()
    made = EmailAdapter(tmp_path / "base")
    yield made
    made.release()


@pytest.fixture(scope="session")
def web_receiver() -> Iterator[None]:
    """One process for all: the path of a request names the test's folder."""
    with receiver_process() as WebhookAdapter.port:
        yield


@pytest.fixture(params=SSH)
def peer(request: pytest.FixtureRequest, between: RealSshd, tmp_path: Path) -> Iterator[SshAdapter]:
    (tmp_path / "base").mkdir()
    made = request.param(tmp_path / "base")
    yield made
    made.release()


@pytest.fixture(params=APPENDING, ids=lambda adapter: adapter.type)
def appender(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AppendAdapter]:
    (tmp_path / "base").mkdir()
    made = request.param(tmp_path / "base")
    yield made
    made.release()


@pytest.fixture
def completions(tmp_path: Path) -> Iterator[CompletionsAdapter]:
    (tmp_path / "base").mkdir()
    made = CompletionsAdapter(tmp_path / "base")
    yield made
    made.release()
