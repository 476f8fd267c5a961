"""The state around a call that must not change its result: threads, instruction set, torch's modes and defaults."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from fastvq.backends import cpu as cpu_backend

THREADS = (1, 2, 5)
# fesetround's numbers of the C library.
ROUNDING = {
    "x86_64": {"nearest": 0, "down": 0x400, "up": 0x800, "zero": 0xC00},
    "aarch64": {"nearest": 0, "up": 0x400000, "down": 0x800000, "zero": 0xC00000},
}.get(platform.machine() if platform.system() == "Linux" else "", {"nearest": 0})
MODES = ("grad", "no_grad", "inference", "autocast")


@dataclass(frozen=True)
class Ambient:
    isa: str | None = None  # None: the best
    threads: int = 1
    mode: str = "grad"
    rounding: str = "nearest"
    flush_denormal: bool = False
    default_dtype: torch.dtype = torch.float32
    default_device: str = "cpu"
    deterministic: bool = False

    @contextmanager
    def applied(self) -> Iterator[None]:
        with ExitStack() as stack:
            self._set_isa(stack)
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            # Torch's threads keep the rounding mode that they are started in, for all later cases: none is started in
            # another one. (tests/native/test_environment.py runs kernels on several threads in each mode.)
            torch.set_num_threads(self.threads if self.rounds_as_usual else 1)
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(self.default_dtype)
            stack.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
            torch.set_deterministic_debug_mode("error" if self.deterministic else "default")
            if self.mode == "no_grad":
                stack.enter_context(torch.no_grad())
            if self.mode == "inference":
                stack.enter_context(torch.inference_mode())
            if self.mode == "autocast":
                stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
            if self.default_device != "cpu":
                stack.enter_context(torch.device(self.default_device))
            if self.flush_denormal and torch.set_flush_denormal(True):
                stack.callback(torch.set_flush_denormal, False)
            if ROUNDING[self.rounding]:
                libc = ctypes.CDLL(None)
                stack.callback(libc.fesetround, ROUNDING["nearest"])
                libc.fesetround(ROUNDING[self.rounding])
            yield

    def _set_isa(self, stack: ExitStack) -> None:
        before = os.environ.pop("FASTVQ_CPU_ISA", None)
        if self.isa is not None:
            os.environ["FASTVQ_CPU_ISA"] = self.isa

        def restore() -> None:
            os.environ.pop("FASTVQ_CPU_ISA", None)
            if before is not None:
                os.environ["FASTVQ_CPU_ISA"] = before

        stack.callback(restore)

    @property
    def takes_gradients(self) -> bool:
        return self.mode in ("grad", "autocast")

    @property
    def rounds_as_usual(self) -> bool:
        """Else what torch itself computes, as a part of the gradients, has other last bits."""
        return self.rounding == "nearest" and not self.flush_denormal

    def plain(self, keep_rounding: bool = False) -> "Ambient":
        """The same instruction set, one thread, and torch as it starts."""
        rounding = {"rounding": self.rounding, "flush_denormal": self.flush_denormal} if keep_rounding else {}
        return Ambient(self.isa, **rounding)


def ambients(modes: tuple[str, ...] = MODES, rounding: bool = True) -> st.SearchStrategy[Ambient]:
    """Half of them with threads and instruction set alone, the others with everything."""
    where = {"isa": st.sampled_from([None, *cpu_backend.available_isas()]), "threads": st.sampled_from(THREADS)}
    rare = {
        "mode": st.sampled_from(modes),
        "rounding": st.sampled_from(list(ROUNDING) if rounding else ["nearest"]),
        "flush_denormal": st.booleans() if rounding else st.just(False),
        "default_dtype": st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16)),
        "default_device": st.sampled_from(("cpu", "cpu", "meta")),
        "deterministic": st.booleans(),
    }
    return st.one_of(st.builds(Ambient, **where), st.builds(Ambient, **where, **rare))
