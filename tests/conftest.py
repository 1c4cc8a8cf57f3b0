"""What holds for all tests: which of them can run here, and that a test left out is never left out quietly."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from budget import load_profile
from realbox import RealBox, real_box
from realsshd import SSHD

from agentqd.storage import connection

MakeBox = Callable[..., RealBox]

# Tests with these marks may be skipped on a person's machine, with a reason. In CI they must run.
MUST_RUN_IN_CI = ("root", "sshd", "systemd", "image")


def pytest_configure() -> None:
    """A suite started in the background (`sh -c '... &'`) inherits an ignored SIGINT, and would hand it on to every program
    that it interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    load_profile()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips",
        action="store_true",
        help="a skipped test marked root, sshd, systemd or image is a failure (script/test sets this when CI=true)",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if os.geteuid() != 0:
        missing["root"] = "needs root"
    if not os.path.exists(SSHD):
        missing["sshd"] = f"needs {SSHD} (Debian: openssh-server)"
    for item in items:
        for mark, reason in missing.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """With --no-skips, turn the skip of a test that must run into a failure that says why it did not."""
    report: pytest.TestReport = yield
    must_run = any(item.get_closest_marker(mark) for mark in MUST_RUN_IN_CI)
    if (
        report.skipped
        and must_run
        and not hasattr(report, "wasxfail")
        and item.config.getoption("--no-skips")
    ):
        report.outcome = "failed"
        report.longrepr = f"did not run, and --no-skips demands it: {_reason(report)}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The last lines before pytest's closing one: what was not run and why, and which other checks failed."""
    reasons = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", ()))
    if reasons:
        terminalreporter.section("not run here")
        for reason, count in sorted(reasons.items()):
            terminalreporter.write_line(f"{count} test{'s' if count > 1 else ''}: {reason}", yellow=True)
    if failed := os.environ.get("AGENTQD_CHECKS_FAILED"):
        terminalreporter.section("checks before the tests")
        terminalreporter.write_line(f"FAILED: {failed} (their words are above)", red=True)


def _reason(report: pytest.TestReport) -> str:
    if isinstance(
        report.longrepr, tuple | list
    ):  # (file, line, reason); a list when it comes from another process
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return str(report.longrepr)


@pytest.fixture(autouse=True, scope="session")
def cold_log() -> Iterator[None]:
    """Growing the log by 8 MiB at each start makes commits fast for days; in a test's own journal it only costs (40 ms).
    The daemons that tests start do it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "_WAL_WARM_BYTES", 4096)
        yield


@pytest.fixture
def make_box(tmp_path: Path) -> Iterator[MakeBox]:
    """make_box(config=None, start=True, name="box") → a RealBox, ended with the test."""
    with ExitStack() as stack:

        def make(config: str | None = None, *, start: bool = True, name: str = "box") -> RealBox:
            folder = tmp_path / name
            folder.mkdir()
            return stack.enter_context(real_box(folder, config, start=start))

        yield make


@pytest.fixture
def box(make_box: MakeBox) -> RealBox:
    """A running box with the default settings."""
    return make_box()
