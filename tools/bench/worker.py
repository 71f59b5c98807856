"""A process for one task: reads it on stdin, writes events to a pipe, and may crash or hang without harm to others.

Events are JSON lines: `{"peer": …, "stage": …}` before each thing that may go wrong, and one `{"result": …}` at last.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import asdict
from typing import Any

from bench.grid import Case, Effort
from bench.results import PeerRow, decode


def main() -> None:
    request = json.load(sys.stdin)
    # A pipe of its own: what packages print must not get between the events.
    with os.fdopen(int(sys.argv[1]), "w") as events:

        def send(event: dict[str, Any]) -> None:
            events.write(json.dumps(event) + "\n")
            events.flush()

        if request["memory_bytes"]:
            resource.setrlimit(resource.RLIMIT_DATA, (request["memory_bytes"],) * 2)
        send({"result": _done(request, lambda peer, stage: send({"peer": peer, "stage": stage}))})


def _done(request: dict[str, Any], announce: Any) -> Any:
    threads = request["threads"]
    if request["task"] == "ceilings":
        import torch

        from bench.ceiling import ceilings

        torch.set_num_threads(threads)
        # torch's own pool carries the threads: it is there once something ran on it.
        torch.ones(1 << 20).add_(1)
        return [asdict(each) for each in ceilings(threads)]
    from bench.measure import measure_case

    case = decode(Case, request["case"], "case")
    effort = decode(Effort, request["effort"], "effort")
    lost = [decode(PeerRow, row, "lost") for row in request["lost"]]
    return measure_case(case, effort, threads, announce, lost, device=request.get("device", "cpu")).to_dict()


if __name__ == "__main__":
    main()
