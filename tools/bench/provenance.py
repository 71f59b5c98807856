"""Where results come from: machine, versions, commit.

This file decides what is written down about them. It loads no torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from bench.results import Provenance
from sparsec import data
from sparsec.backends import cpu
from sparsec.device import Device, detect_cpu
from sparsec.errors import BackendMissingError

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "numpy", "scipy", "networkx")
# What else computes attention on a GPU.
_DEVICE_PACKAGES = ("triton", "flash-attn", "flash-attn-3", "flashinfer-python", "natten", "xformers", "magi-attention")
_VARIABLES = ("SPARSEC_", "OMP_", "GOMP_", "MKL_", "KMP_", "CXX", "TORCH")


def provenance(device: Device | None = None) -> Provenance:
    """Of the processor, or of a GPU at hand."""
    device = device or detect_cpu()
    versions = {"python": platform.python_version()}
    for name in (*_PACKAGES, *(_DEVICE_PACKAGES if device.kind != "cpu" else ())):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    try:
        versions["compiler"] = cpu.compiler().version
    except BackendMissingError:
        versions["compiler"] = "none"
    return Provenance(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_git("rev-parse", "HEAD"),
        is_dirty=bool(_git("status", "--porcelain", "--untracked-files=no", "--", "sparsec", "templates")),
        code_digest=code_digest(),
        device=device.key,
        # Virtual machines hide most of the name.
        processor=", ".join(filter(None, (device.label, device.model))),
        isa=device.isa or device.arch,
        cores=device.units,
        memory_bytes=device.memory_bytes,
        system=f"{platform.system()} {platform.release()}",
        versions=versions,
        # Where a cache lies says nothing about speed, and is nobody's business.
        environment={
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_VARIABLES) and not name.endswith("_CACHE_DIR")
        },
    )


def code_digest() -> str:
    """Changes with any source of sparsec or of a template, committed or not."""
    digest = hashlib.sha256()
    for folder in (Path(data.__file__).parent, data.templates_dir()):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".yaml", ".cpp", ".hpp", ".cu", ".cuh") and path.is_file():
                digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
