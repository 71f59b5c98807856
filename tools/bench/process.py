"""A module of this package in a process of its own: JSON on stdin, and JSON in the last line of stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsec.errors import SparsecError

_TOOLS = Path(__file__).resolve().parents[1]


def answer(
    module: str, request: Mapping[str, Any], environment: Mapping[str, str], tool: Sequence[str] = ()
) -> Any:  # Any: JSON values
    """What `bench.<module>` answers.

    Args:
        module: Its name.
        request: What it is asked.
        environment: Variables, beside those of this process.
        tool: A command that runs it, such as valgrind.

    Raises:
        SparsecError: It failed; says how, in its own last words.
    """
    done = subprocess.run(
        [*tool, sys.executable, "-m", f"bench.{module}"],
        input=json.dumps(request),
        cwd=_TOOLS,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        # Lines that begin so are valgrind's.
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("==")][-1:]
        under = f" under {Path(tool[0]).name}" if tool else ""
        raise SparsecError(f"bench.{module}{under} ended with status {done.returncode}: {''.join(said)}")
    return json.loads(done.stdout.splitlines()[-1])
