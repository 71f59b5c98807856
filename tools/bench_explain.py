"""How long `sparsec explain` takes from the shell, and the page of `--html` in a browser.

    python tools/bench_explain.py --json FILE

Each command runs in fresh processes, interpreter and imports included, output thrown away. The masks are those of the
grid `cpu_forward` and a few harder ones; at the long length, those that a user of ten million tokens could want. A page
is opened in a headless Chromium, where there is one: its size, and the time to its first paint.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.resources import files
from itertools import cycle
from pathlib import Path
from statistics import median

import click
from bench.grid import MaskSource
from bench.provenance import provenance
from bench.workload import document_lengths

ROOT = Path(__file__).resolve().parents[1]
SHORT, LONG = 65_536, 10_000_000
AIM_S = {SHORT: 1.5, LONG: 5.0}
GRAPH = str(files("sparsec") / "demo_data" / "debian_depends.npz")

# Documents are those of the grid, over and over; a graph has its own length.
_ALWAYS = {
    "window": "window(255, 255)",
    "causal window": "window(255, 0)",
    "bigbird": "bigbird(64, 3, 2, 3, 0)",
    "longformer": "longformer(512, 1)",
    "documents": "",
    "dilated": "dilated(2040, 8)",
    "random blocks": "random_blocks(8, 64, 0)",
}
MASKS: dict[int, dict[str, str]] = {
    SHORT: {
        "full": "full()",
        "causal": "causal()",
        **_ALWAYS,
        "neighborhood": "neighborhood((256, 256), 13)",
        "strided": "strided(512)",
        "random edges": "random_edges(64, 0)",
        "debian_depends": GRAPH,
    },
    LONG: {
        **_ALWAYS,
        "neighborhood": "neighborhood((2500, 4000), 13)",
        "strided": "strided(65536)",
        "random edges": "random_edges(8, 0)",
    },
}


@click.command()
@click.option("--device", "devices", multiple=True, default=("cpu", "nvidia-h100"), show_default=True)
@click.option("--only", help="Only masks whose name contains this.")
@click.option("--length", "lengths", type=click.Choice(["64k", "10m"]), multiple=True, default=("64k", "10m"))
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--page/--no-page", "has_page", default=True, show_default=True, help="Also time the page at 1 M tokens.")
@click.option("--timeout", type=click.IntRange(1), default=120, show_default=True, help="Seconds for one command.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also writes the results here.")
def bench(
    devices: tuple[str, ...],
    only: str | None,
    lengths: tuple[str, ...],
    repeats: int,
    has_page: bool,
    timeout: int,
    path: Path | None,
) -> None:
    """Times explain."""
    rows = []
    for length in (SHORT, LONG):
        if ("64k" if length == SHORT else "10m") not in lengths:
            continue
        for name, mask in MASKS[length].items():
            if only is not None and only not in name:
                continue
            for device in devices:
                row = timed(name, mask or documents(length), length, device, repeats, timeout)
                rows.append(row)
                click.echo(told(row))
    results: dict[str, object] = {"explain": rows}
    if has_page:
        results["page"] = page(timeout)
        click.echo(f"page of 1 M tokens: {results['page']}")
    if path is not None:
        path.write_text(json.dumps({"provenance": asdict(provenance()), **results}, indent=1) + "\n")


def documents(length: int) -> str:
    """As many documents of the grid's lengths as fill so many tokens, the last one cut."""
    known = document_lengths(MaskSource("documents", "stdlib_token_lengths.csv", {"total": SHORT}))

    def cut() -> Iterator[int]:
        left = length
        for each in cycle(known):
            yield min(each, left)
            left -= min(each, left)
            if not left:
                return

    return f"documents({list(cut())})"


def timed(name: str, mask: str, length: int, device: str, repeats: int, timeout: int) -> dict[str, object]:
    words = ["explain", mask, "--heads", "8", "--device", device]
    words += [] if mask == GRAPH else ["--seq-len", str(length)]
    row: dict[str, object] = {"mask": name, "tokens": None if mask == GRAPH else length, "device": device}
    seconds, peaks = [], []
    for _ in range(repeats):
        try:
            took, peak = ran(words, timeout)
        except subprocess.TimeoutExpired:
            return row | {"seconds": [], "failed": f"longer than {timeout} s", "aim_s": AIM_S[length]}
        except subprocess.CalledProcessError as error:
            return row | {"seconds": [], "failed": error.stderr.strip()[-200:], "aim_s": AIM_S[length]}
        seconds.append(round(took, 3))
        peaks.append(peak)
    return row | {"seconds": seconds, "peak_bytes": max(peaks), "aim_s": AIM_S[length]}


def ran(words: list[str], timeout: int) -> tuple[float, int]:
    """Seconds and peak memory of one command in a process of its own."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "sparsec.cli", *words],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        while True:
            # What a finished child used is told by waiting for it in just this way.
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            if time.perf_counter() - started > timeout:
                process.kill()
                os.wait4(process.pid, 0)
                raise subprocess.TimeoutExpired(words, timeout)
            time.sleep(0.002)
        took = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise subprocess.CalledProcessError(process.returncode, words, stderr=errors.read())
    return took, usage.ru_maxrss * 1024


def told(row: dict[str, object]) -> str:
    seconds = row["seconds"]
    title = f"{row['mask']:14} {row['tokens'] or 'own length':>10} {row['device']:12}"
    if not isinstance(seconds, list) or not seconds:
        return f"{title} {row['failed']}"
    middle = median(seconds)
    verdict = "" if middle <= float(str(row["aim_s"])) else f"  aim {row['aim_s']} s missed"
    return f"{title} {middle:6.2f} s, {min(seconds):.2f} to {max(seconds):.2f}{verdict}"


def page(timeout: int) -> dict[str, object]:
    """The page of a million tokens: how long it takes to write, its size, and the time to its first paint."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "page.html"
        mask = "window(255, 0) | global_tokens(16)"
        took, _ = ran(["explain", mask, "--seq-len", str(1 << 20), "--html", str(target)], timeout)
        found: dict[str, object] = {"mask": mask, "seconds": round(took, 3), "bytes": target.stat().st_size}
        if not any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")):
            return found | {"first_paint_ms": None}
        sys.path.insert(0, str(ROOT / "tests"))
        from chromium import Page

        browser = Page()
        try:
            paints = []
            for _ in range(3):
                browser.open(target)
                entry = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
                paints.append(round(float(browser.run(entry)), 1))
        finally:
            browser.close()
        return found | {"first_paint_ms": paints, "aim_ms": 2000, "aim_bytes": 6_000_000}


if __name__ == "__main__":
    bench()
