"""Programs that the tests of tuning start: a worker that fails on request, and one of several searches of a study.

Neither imports torch, so that a test may start many and end them by force.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict

from sparsec import masks as m
from sparsec.backends.base import Problem
from sparsec.device import device
from sparsec.tuning.measure import Look, Measurement
from sparsec.tuning.search import Budget, search
from sparsec.tuning.space import Choice, Space, Task
from sparsec.tuning.studies import Settings, Study, open_storage

# A described device: its space has hundreds of points, and needs none to be here.
DEVICE = device("nvidia-h100")


def space(template: str | None = "block_sparse") -> Space:
    task = Task(m.window(255, 0).bind(4096), Problem(4096, 4096, 8, 8, 64, 64, "bf16"), DEVICE, template=template)
    return Space(task)


def true_us(choice: Choice) -> float:
    """A landscape with one best point: every tunable has a value it likes, and they weigh differently."""
    liked = {"block_q": 128, "block_kv": 32, "pack_gqa": 1, "num_warps": 8, "num_stages": 2, "fetch": 128}
    us = 100.0
    for weight, (name, value) in enumerate(choice.config.items, 1):
        us *= 1.0 + 0.06 * weight * abs(value.bit_length() - liked.get(name, value).bit_length())
    return us


def faulty() -> None:
    """Answers like a worker; what `block_q` and `block_kv` ask for happens to it."""
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        for line in sys.stdin:
            request = json.loads(line)
            choice = Choice.from_text(request["measure"])
            match choice.config["block_kv"]:
                case 16:
                    os.abort()
                case 32:
                    time.sleep(600)
                case 128:
                    kept = bytearray(700 << 20)
                    kept[:: 1 << 12] = b"x" * len(kept[:: 1 << 12])
                    time.sleep(600)
            found = Measurement((true_us(choice),) * 5)
            answers.write(json.dumps({"measurement": asdict(found), "is_leaving": False}) + "\n")
            answers.flush()


class Slow:
    """Takes its time, and says what it is at."""

    def measure(self, choice: Choice, look: Look) -> Measurement:
        print("measuring", choice.to_text(), flush=True)
        time.sleep(0.05)
        return Measurement((true_us(choice),) * 5)

    def compare(self, choices: list[Choice], rounds: int, seconds: float) -> list[Measurement]:
        return [Measurement((true_us(choice),) * 9) for choice in choices]

    def close(self) -> None:
        pass


def searcher(storage: str, trials: int) -> None:
    """One of several processes that search the same study."""
    mine = space()
    outcome = search(mine, Slow(), Study(mine, open_storage(storage), Settings(seed=os.getpid())), Budget(60.0, trials))
    print("winner", outcome.winner.to_text(), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 3 and sys.argv[1] == "search":
        searcher(sys.argv[2], int(sys.argv[3]))
    else:
        faulty()
