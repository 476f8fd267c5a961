"""What every benchmark here shares: timing, memory, the machine, tables, files and progress."""

from harness.machine import Ceilings, describe_machine, describe_versions
from harness.memory import PeakMemory
from harness.oracle import count_differing, nearest_float64
from harness.report import Progress, Row, missing_extras, print_notes, print_table, write_csv
from harness.timing import Call, Times, interleave, paired_ratio, thread_count

__all__ = [
    "Call",
    "Ceilings",
    "PeakMemory",
    "Progress",
    "Row",
    "Times",
    "count_differing",
    "describe_machine",
    "describe_versions",
    "interleave",
    "missing_extras",
    "nearest_float64",
    "paired_ratio",
    "print_notes",
    "print_table",
    "thread_count",
    "write_csv",
]
