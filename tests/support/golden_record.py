"""Writes the record of golden indices, from the oracle alone: ``python -m tests.support.golden_record``."""

import json
from pathlib import Path

from fastvq.backends.golden import record as golden_record
from fastvq.backends.golden.record import Lookup
from tests.support import oracle


def entry(lookup: Lookup) -> dict[str, str]:
    indices = oracle.nearest(lookup.x, lookup.codebook, lookup.metric)
    return {"inputs": golden_record.digest(lookup), "indices": golden_record.encode(indices)}


if __name__ == "__main__":
    record = {lookup.name: entry(lookup) for lookup in golden_record.lookups()}
    path = Path(golden_record.__file__).parent / golden_record.RECORD
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(record)} lookups, {path.stat().st_size} bytes: {path}")
