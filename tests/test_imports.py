"""A fresh process shows what importing sparsec brings with it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "triton", "cuda", "optuna", "networkx", "matplotlib"}

_REPORT = """
import json, sys, threading
{statement}
print(json.dumps({{
    "modules": sorted({{name.partition(".")[0] for name in sys.modules}}),
    "threads": threading.active_count(),
}}))
"""


def _import_in_fresh_process(statement: str, home: Path) -> dict[str, object]:
    environment = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", _REPORT.format(statement=statement)],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert result.stderr == ""
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "module", ["", "data", "device", "expr", "masks", "layout", "analysis", "template", "records", "planner", "cli"]
)
def test_importing_is_light_and_leaves_nothing_behind(module, tmp_path):
    name = f"sparsec.{module}" if module else "sparsec"
    report = _import_in_fresh_process(f"import {name}", tmp_path)
    assert not HEAVY.intersection(report["modules"])
    assert report["threads"] == 1
    assert list(tmp_path.iterdir()) == []


def test_describing_every_device_needs_no_gpu_package(tmp_path):
    statement = "from sparsec import device; assert len(device.devices()) == 10"
    assert not HEAVY.intersection(_import_in_fresh_process(statement, tmp_path)["modules"])
