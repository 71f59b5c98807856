"""Instructions that the CPU kernels execute, by valgrind's callgrind: the measure that a busy machine does not move.

This file decides what is counted: the instructions inside the kernels' own binaries, on one thread, with AVX2, as
valgrind knows no AVX-512. What Python and torch do around them is left out.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from bench.grid import Case
from bench.process import answer
from bench.sheet import Figure
from sparsec import data
from sparsec.backends import cpu
from sparsec.errors import SparsecError

ISA: Final = "avx2"
PROTOCOL: Final = (
    "callgrind counts the instructions of one call, after one that is not counted, inside the kernels' own binaries; "
    "one thread; every case was run without valgrind first, and its output checked against dense attention in fp64"
)
_HEADER: Final = Path("/usr/include/valgrind/callgrind.h")
_MARKS: Final = """
#include <valgrind/callgrind.h>
extern "C" void begin() { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
extern "C" void end(const char* name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""
_ENVIRONMENT: Final = {"SPARSEC_ISA": ISA, "SPARSEC_TUNE": "off", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def missing() -> str | None:
    """What is not here of that which counting needs, in one sentence; None where nothing is."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed (Debian: apt install valgrind)"
    if not _HEADER.is_file():
        return f"{_HEADER} is not there: it comes with valgrind's headers"
    return None


def count(cases: Sequence[Case]) -> list[Figure]:
    """Instructions of each peer of each case.

    Raises:
        SparsecError: Something that is needed is missing, or a process failed; says what it said.
    """
    if told := missing():
        raise SparsecError(f"instructions cannot be counted: {told}")
    with tempfile.TemporaryDirectory(prefix="sparsec-count-") as name:
        folder = Path(name)
        source, marks = folder / "marks.cpp", folder / "marks.so"
        source.write_text(_MARKS)
        command = [*cpu.compiler().command, "-O1", "-fPIC", "-shared", str(source), "-o", str(marks)]
        subprocess.run(command, check=True, capture_output=True)
        request = {"marks": str(marks), "cases": [asdict(case) for case in cases]}
        verdicts = answer("counted", {**request, "checks": True}, _ENVIRONMENT)
        dumps = folder / "dump"
        tool = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={dumps}"]
        answer("counted", {**request, "checks": False}, _ENVIRONMENT, tool)
        counts = dict(_counted(path, data.cache_dir() / "cpu") for path in sorted(folder.glob("dump.*")))
    figures = []
    names = [(index, case, peer) for index, case in enumerate(cases) for peer in case.peers]
    for (index, case, peer), (error, allowed) in zip(names, verdicts, strict=True):
        key = f"{index} {peer}"
        if not counts.get(key):
            raise SparsecError(f"callgrind counted nothing in the kernels of {case.id}, {peer}")
        shape: dict[str, int | float | str] = {"peer": peer, "mask": str(case.mask), "dtype": case.dtype}
        shape |= {"direction": case.direction.replace("_", " + ")}
        shape |= {"tokens": case.length} if case.length else {}
        figures.append(Figure(case.name, counts[key], "instructions", shape, error=error, allowed=allowed))
    return figures


def _counted(dump: Path, binaries: Path) -> tuple[str, int]:
    """The name of a dump, and the instructions it found inside the binaries of a folder.

    Source: Callgrind Format Specification, https://valgrind.org/docs/manual/cl-format.html.
    """
    name, total = "", 0
    objects: dict[str, str] = {}
    is_ours = is_call = False
    for line in dump.read_text().splitlines():
        if line.startswith("desc: Trigger: Client Request: "):
            name = line.removeprefix("desc: Trigger: Client Request: ")
        elif named := re.match(r"c?ob=\((\d+)\)(?: (.*))?$", line):
            if named[2]:
                objects[named[1]] = named[2]
            if line.startswith("ob="):
                is_ours = Path(objects[named[1]]).parent == binaries
        elif line.startswith("calls="):
            # The line after it is the cost of the call, which the callee has said itself.
            is_call = True
        elif re.match(r"[+\-*\d]", line):
            if is_ours and not is_call:
                total += int(line.split()[1])
            is_call = False
    return name, total
