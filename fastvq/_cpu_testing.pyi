"""``fastvq._cpu_testing``: the binding of csrc/bind_cpu_testing.cpp, in editable installs and with FASTVQ_TESTING=1."""

from collections.abc import Sequence

# The largest |score - truth| / bound of the lookup's filter, and the number of rows and codes that were compared.
def bound_use(x: Sequence[int], codes: Sequence[int], metric: int, isa: int, /) -> tuple[float, int]: ...

# GFLOP/s of the multiply-adds of an instruction set's filter, on the calling thread.
def peak_gflops(isa: int, milliseconds: float, /) -> float: ...
