"""What one device has shown: results by key, kept in one file that every result makes anew.

This file decides when earlier results still count (same device, same sources, same toolchain), and what is known of the
task at hand: a small file beside the results, so that whoever watches can tell who hangs. It must not know what the
results are of.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gate.checks import absent_kernels, own_kernels
from sparsec.backends.base import backend
from sparsec.device import Device

ROOT = Path(__file__).resolve().parents[2]

Result = dict[str, Any]  # one JSON object of a record


@dataclass(frozen=True)
class Running:
    """What a worker is at.

    Attributes:
        key: The task.
        since: When it gave its last sign of life, in seconds since 1970.
        who: Whom it is busy with, where a task has several; else "".
        stage: With what.
    """

    key: str
    since: float
    who: str = ""
    stage: str = ""


class Record:
    """Results of one device with one toolchain at one state of the sources; written whole, by rename.

    Results of others are kept beside under another name: a machine that lacks a package must not cost what one that
    has it has shown.
    """

    def __init__(self, device: Device, folder: Path) -> None:
        import torch

        self.path = folder / f"{device.key}.json"
        names = dict.fromkeys(name for _, name in own_kernels(device))
        self.about = {
            "device": device.key,
            "label": torch.cuda.get_device_name(),
            "arch": device.arch,
            "commit": commit() or f"unknown (sources {sources_digest()})",
            "sources": sources_digest(),
            "toolchain": ", ".join([*(backend(name).toolchain() for name in names), f"torch {torch.__version__}"]),
            "absent": absent_kernels(device),
        }
        self.results: dict[str, Result] = {}
        self.read()
        if self.path.is_file() and not self.results:
            number = len([*folder.glob(f"{self.path.stem}.*.old")]) + 1
            os.replace(self.path, self.path.with_suffix(f".{number}.old"))

    def read(self) -> None:
        """Takes up what the file holds; nothing where other sources or another toolchain wrote it."""
        kept = json.loads(self.path.read_text()) if self.path.is_file() else {}
        is_same = all(kept.get(name) == self.about[name] for name in ("device", "sources", "toolchain"))
        self.results = kept["results"] if is_same else {}

    def begin(self, key: str, who: str = "", stage: str = "") -> None:
        """Tells what is done from now on; each time is a sign of life."""
        self._put(self._now, json.dumps(asdict(Running(key, time.time(), who, stage))))

    def write(self, key: str, result: Result) -> None:
        """Keeps a result; its task is no longer at hand."""
        self.results[key] = result
        self._put(self.path, json.dumps({**self.about, "results": self.results}, indent=1) + "\n")
        self.rest()

    def running(self) -> Running | None:
        """What was begun and has not ended."""
        try:
            return Running(**json.loads(self._now.read_text()))
        except FileNotFoundError:
            return None

    def rest(self) -> None:
        """Forgets what was begun and has not ended."""
        self._now.unlink(missing_ok=True)

    def counts(self) -> dict[str, int]:
        """How many results there are of each status."""
        counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
        for result in self.results.values():
            counts[result["status"]] = counts.get(result["status"], 0) + 1
        return counts

    @property
    def _now(self) -> Path:
        return self.path.with_suffix(".now")

    def _put(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.tmp")
        beside.write_text(text)
        os.replace(beside, path)


def commit() -> str:
    """The commit that is checked out, "" where there is no history; "+" says that files differ from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip()


def sources_digest() -> str:
    """Of everything a result depends on; a machine without the repository's history knows no commit."""
    digest = hashlib.sha256()
    for folder in ("sparsec", "templates", "tools"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".cu", ".cuh", ".yaml"} and path.is_file():
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
