"""What was measured, where it is kept, and which of it answers a question.

`record.py` says what a line holds, `winners.py` which configuration measurements speak for, `index.py` what is read of
a file, `base.py` where records are kept and which are near, `upkeep.py` what becomes of whole files.
"""

from sparsec.records.base import RecordBase, Served, database
from sparsec.records.record import Calibration, Direction, Failure, RecordKey, TuningRecord, Workload
from sparsec.records.winners import NEAR_TIE, Case

__all__ = [
    "NEAR_TIE",
    "Calibration",
    "Case",
    "Direction",
    "Failure",
    "RecordBase",
    "RecordKey",
    "Served",
    "TuningRecord",
    "Workload",
    "database",
]
