"""`python -m benchmarks` from the top of the tree: every row, a table, and benchmarks/last-run.json beside it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import (
    choosing,
    claims,
    delivery,
    intake,
    isolation,
    machine,
    remote,
    rest,
    spawn_latency,
    status,
    throughput,
    waiting,
    webhook,
)
from benchmarks.measure import Row

_OUTPUT = Path(__file__).with_name("last-run.json")


def main() -> int:
    """Exit 0 when every limit is met, 1 when one is missed."""
    arguments = _parse()
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"):  # programs as installed: with their bytecode
        os.environ.pop(name, None)
    base = machine.real_disk(
        [arguments.dir] if arguments.dir else [tempfile.gettempdir(), "/var/tmp", os.getcwd()]
    )
    folder = Path(tempfile.mkdtemp(prefix="agentqd-bench-", dir=base))
    try:
        found = machine.describe(folder)
        found["fdatasync_us"] = machine.fdatasync_cost(folder, 100 if arguments.quick else 1000)
        print(_machine_text(found), flush=True)
        rows = _measure(folder, arguments)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(rows))
    document = {"machine": found, "quick": arguments.quick, "rows": [row.as_json() for row in rows]}
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if any(row.met is False for row in rows) else 0


def _measure(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    quick = arguments.quick
    samples = 100 if quick else 1000
    lines = 10_000 if quick else 100_000
    parts: dict[str, Callable[[], list[Row]]] = {
        "latency": lambda: spawn_latency.measure(folder, samples),
        "throughput": lambda: throughput.measure(
            folder, 100 if quick else 1000, 1 if quick else throughput.ROUNDS
        ),
        "intake": lambda: intake.measure(folder, lines, 1 if quick else intake.ROUNDS),
        "waiting": lambda: waiting.measure(folder, lines, samples),
        "choosing": lambda: choosing.measure(
            _sub(folder, "choosing"), 100_000 if quick else 1_000_000, 50 if quick else 200
        ),
        "claims": lambda: claims.measure(_sub(folder, "claims"), 10_000, samples),
        "rest": lambda: rest.measure(folder, 5 if quick else 30),
        "status": lambda: status.measure(folder, samples),
        "webhook": lambda: webhook.measure(
            folder, 2_000 if quick else 20_000, 1 if quick else webhook.ROUNDS
        ),
        "delivery": lambda: delivery.measure(
            folder / "delivery",
            lines,
            20_000 if quick else 100_000,
            50 if quick else 500,
            1 if quick else delivery.ROUNDS,
        ),
        "isolation": lambda: isolation.measure(
            _sub(folder, "isolation"), min(samples, isolation.SAMPLES), 0.1 if quick else 1.0
        ),
        "remote": lambda: remote.measure(
            folder,
            submits=20 if quick else 50,
            statuses=40 if quick else 300,
            artifact_bytes=100_000_000 if quick else 1_000_000_000,
            pulls=1 if quick else 3,
        ),
    }
    if arguments.large:
        parts["large"] = lambda: waiting.measure(_sub(folder, "large"), 1_000_000, samples)
    rows: list[Row] = []
    for name in arguments.only or parts:
        began = time.monotonic()
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        rows += parts[name]()
        print(f"{time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return rows


def _sub(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def table(rows: list[Row]) -> str:
    """As it stands in docs/benchmarks.md."""
    lines = [("what", "floor", "ours", "ratio", "to reach", "met", "")]
    for row in rows:
        unit = row.unit if row.unit.startswith(("/", "%")) else f" {row.unit}"
        sign = "≤" if row.better == "lower" else "≥"
        of = {"ratio": "x", "difference": f"{unit} more", "value": unit}[row.judged]
        reach = "" if row.limit is None else f"{sign} {row.limit:g}{of}"
        lines.append(
            (
                row.what,
                "" if row.floor is None else f"{_number(row.floor)}{unit}",
                f"{_number(row.ours)}{unit}",
                "" if row.ratio is None else f"{row.ratio:.2f}x",
                reach,
                {True: "yes", False: "NO", None: ""}[row.met],
                row.note,
            )
        )
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _machine_text(found: dict[str, Any]) -> str:
    sync = found["fdatasync_us"]
    costs = "; ".join(
        f"{name.replace('_', ' ')} p50 {of['p50']:.0f} us, p99 {of['p99']:.0f} us"
        for name, of in sync.items()
    )
    return (
        f"{found['cores']} cores ({found['cpu']}{', virtual' if found['virtual'] else ''}), {found['memory_gb']} GB, Linux {found['kernel']},"
        f" {found['file_system']}, Python {found['python']}, SQLite {found['sqlite']}, load {found['load_before']:.2f} before\n"
        f"fdatasync after 4 KiB: {costs}\n"
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Speed, as ratios against floors measured in the same run."
    )
    parser.add_argument(
        "--quick", action="store_true", help="100 samples, 10,000 lines: does it work, not how fast is it"
    )
    parser.add_argument("--large", action="store_true", help="also with 1,000,000 waiting tasks")
    parser.add_argument(
        "--only",
        action="append",
        metavar="PART",
        choices=[
            "latency",
            "throughput",
            "intake",
            "waiting",
            "choosing",
            "claims",
            "rest",
            "status",
            "webhook",
            "delivery",
            "isolation",
            "remote",
            "large",
        ],
    )
    parser.add_argument(
        "--dir", metavar="DIR", help="a folder on a real disk (default: the temporary one, /var/tmp, here)"
    )
    parser.add_argument("--json", type=Path, default=_OUTPUT, metavar="FILE", help=f"default: {_OUTPUT}")
    arguments = parser.parse_args()
    if "large" in (arguments.only or []):
        arguments.large = True
    return arguments


if __name__ == "__main__":
    sys.exit(main())
