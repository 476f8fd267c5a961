"""Compiles the launches of the Triton kernels for an absent card: ``python -m tests.support.triton_offline ARCH``.

Each call of ``triton_calls.CALLS`` runs an op's own launcher on fake CUDA tensors. A launch compiles its kernel
for ARCH (80, 90 or 100) instead of running it, and what the compiler made of it is printed as one line of JSON:
registers, stack, shared memory and how often each instruction of the tensor cores occurs. So the very arguments, tiles
and constants that ship are what is compiled. Must not run under TRITON_INTERPRET.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, MockTensor

from fastvq.backends import triton as triton_backend

TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Tensor cores of each generation, as PTX names them: the assembler translates them one to one, and reading what it made
# of them would take as long as compiling.
PRODUCTS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")


class OfflineDriver:
    """Stands in for the CUDA driver: names the card to compile for, and knows nothing else."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # one id a card: Triton's cache of kernels is keyed by it

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cuda", 0)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of local memory: what a kernel spills lies there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))
    return {"registers": int(used["REG"]), "stack": int(used["STACK"]) + int(used["LOCAL"])}


def main(arch: int) -> None:
    from tests.support.triton_calls import CALLS, REPEATS

    driver.set_active(OfflineDriver(arch))
    triton_backend.capability = lambda device: arch
    seen: set[str] = set()
    call_name = ""
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        def stand_in(value):
            return MockTensor(value.dtype, list(value.shape)) if isinstance(value, Tensor) else value

        kernel = run(self, *map(stand_in, args), grid=grid, warmup=True, **{k: stand_in(v) for k, v in kwargs.items()})
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            line = {
                "call": call_name,
                "kernel": self.fn.__name__,
                "shared": kernel.metadata.shared,
                "warps": kernel.metadata.num_warps,
                "stages": kernel.metadata.num_stages,
                **resources(kernel.asm["cubin"]),
                "products": {name: n for name in PRODUCTS if (n := kernel.asm["ptx"].count(name))},
                "constants": {k: v for k, v in kwargs.items() if isinstance(v, (int, str, bool))},
            }
            print(json.dumps(line), flush=True)
        return kernel

    JITFunction.run = compile_only
    for name, call in (CALLS | REPEATS).items():
        call_name = name
        with FakeTensorMode():
            call()


if __name__ == "__main__":
    main(int(sys.argv[1]))
