"""One process: reads a case on stdin, prints the microseconds of `compile` and the first call, imports excluded."""

from __future__ import annotations

import json
import sys
import time

import torch

import sparsec.masks
import sparsec.runtime
from bench.grid import Case
from bench.results import decode
from bench.workload import length_of, make_workload, mask_of


def main() -> None:
    request = json.load(sys.stdin)
    case = decode(Case, request["case"], "case")
    torch.set_num_threads(request["threads"])
    work = make_workload(case)
    mask, length = mask_of(case.mask), length_of(case)
    with torch.no_grad():
        started = time.perf_counter_ns()
        sparsec.compile(mask, length)(work.q, work.k, work.v)
        took_us = (time.perf_counter_ns() - started) / 1e3
    print(json.dumps(took_us))


if __name__ == "__main__":
    main()
