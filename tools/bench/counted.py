"""One process, run plainly and then under valgrind: calls each case once between two marks that callgrind sees.

Reads cases and the library of marks on stdin, and prints whether each result was exact. The marks do nothing outside
valgrind, so that the plain run compiles, checks and proves what the other one counts.
"""

from __future__ import annotations

import ctypes
import json
import sys

import torch

from bench.exactness import check
from bench.grid import Case
from bench.peers import peer
from bench.results import decode
from bench.workload import make_workload


def main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(1)
    marks = ctypes.CDLL(request["marks"])
    found = []
    for index, given in enumerate(request["cases"]):
        case = decode(Case, given, "case")
        work = make_workload(case)
        for name in case.peers:
            prepared = peer(name).prepare(work)
            with torch.set_grad_enabled(work.needs_grad):
                _called(prepared.call, work)
                marks.begin()
                out = _called(prepared.call, work)
                marks.end(f"{index} {name}".encode())
            # Under valgrind this would take minutes, and the plain run has shown it.
            if request["checks"]:
                verdict = check(work, out, work.bound)
                found.append([verdict.error, verdict.allowed])
    print(json.dumps(found))


def _called(call, work):
    out = call()
    if work.needs_grad:
        torch.autograd.grad(out, (work.q, work.k, work.v), work.d_out)
    return out.detach()


if __name__ == "__main__":
    main()
