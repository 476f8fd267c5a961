"""The machine code of the CUDA kernels, as far as it can be judged without a GPU."""

import collections
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastvq.backends import cuda as cuda_backend

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
# Of the shape that serves most widths, for 64 dims: of a warp's tile 32 x 64 the products and what follows them. A
# score costs a multiply-add and a maximum, four scores a load of two biases; products come with their operands' loads
# and what the compiler adds. The rest of a kernel, where rows are placed or near-ties settled, is not counted.
SCORES = 64  # of a thread
PRODUCTS_PER_SCORE = 4.0
EPILOGUE_PER_SCORE = {"lookup_kernel": 3.0, "residual_kernel": 3.1}  # the latter finds its level's tiles first


def _disassembler() -> tuple[Path, dict[str, str]] | None:
    """cuobjdump and an environment in which it finds nvdisasm: the CUDA toolkit's, or the one in Triton's wheel."""
    folders = []
    try:
        import triton

        folders.append(Path(triton.__file__).parent / "backends/nvidia/bin")
    except ImportError:
        pass
    if found := shutil.which("cuobjdump"):
        folders.append(Path(found).parent)
    for folder in folders:
        if (folder / "cuobjdump").exists() and (folder / "nvdisasm").exists():
            return folder / "cuobjdump", {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    return None


TOOL = _disassembler()
pytestmark = [
    pytest.mark.skipif(not cuda_backend.built(), reason="fastvq._cuda is not built here"),
    pytest.mark.skipif(TOOL is None, reason="neither the CUDA toolkit nor Triton brings cuobjdump and nvdisasm"),
]


def _dump(*options: str) -> str:
    tool, environment = TOOL
    command = [str(tool), *options, cuda_backend._cuda.__file__]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout


@pytest.fixture(scope="module")
def sm_80() -> dict[str, list[str]]:
    """The instructions of each kernel."""
    kernels: dict[str, list[str]] = collections.defaultdict(list)
    name = ""
    for line in _dump("-sass", "-arch", "sm_80").splitlines():
        if "Function :" in line:
            name = line.split()[-1]
        elif found := INSTRUCTION.match(line):
            kernels[name].append(found[1])
    return kernels


def test_every_architecture_is_there():
    listed = _dump("-lelf")
    named = [a for a in cuda_backend._cuda.architectures().split() if a.startswith("sm_")]
    assert named and all(f"{a}." in listed for a in named)


def test_nothing_spills():
    usage = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", _dump("-res-usage"))
    assert len(usage) >= 10
    assert [u for u in usage if u[2] != "0" or u[3] != "0"] == []


def test_no_kernel_reads_local_memory(sm_80):
    assert [name for name, code in sm_80.items() if any(i.startswith(("LDL", "STL")) for i in code)] == []


def test_lookups_run_on_tensor_cores_with_asynchronous_copies(sm_80):
    lookups = [code for name, code in sm_80.items() if "lookup_kernel" in name]
    residuals = [code for name, code in sm_80.items() if "residual_kernel" in name]
    assert len(lookups) == 8 and len(residuals) == 7
    for code in lookups + residuals:
        assert any(i.startswith("HMMA.16816.F32") for i in code) and any(i.startswith("LDGSTS") for i in code)


def test_lookups_gather_in_wide_stores_and_add_without_an_answer(sm_80):
    for code in (code for name, code in sm_80.items() if "lookup_kernel" in name):
        assert any(i.startswith("STG.E.128") for i in code) and any(i.startswith("RED.E.ADD.F32") for i in code)
        assert not any(i.startswith("ATOM") and not i.startswith("ATOMS") for i in code)


def test_convolutions_of_narrow_types_run_on_tensor_cores(sm_80):
    kernels = {n: code for n, code in sm_80.items() if "convolution_kernel" in n or "weight_kernel" in n}
    assert len(kernels) == 9  # plain, gated and the weight's gradient, of three types
    for name, code in kernels.items():
        products = collections.Counter(i.split(".")[0] for i in code)
        if "DTypeE0" in name:
            assert products["FFMA"] >= 512 and not products["HMMA"]  # 128 x 64 x 16 a step of 256 threads
        else:
            assert products["HMMA"] == 16  # a warp's 16 x 64 x 32


def test_blocks_that_wait_for_one_another_drop_what_they_have_cached(sm_80):
    (code,) = (code for name, code in sm_80.items() if "sampler_kernel" in name)
    fence, arrival, look, invalid = (
        next(at for at, i in enumerate(code) if i.startswith(name))
        for name in ("MEMBAR", "RED.E.ADD.STRONG.GPU", "LDG.E.STRONG.GPU", "CCTL.IVALL")
    )
    assert fence < arrival < look < invalid
    # Weights come in sixteen bytes, past what is invalidated.
    assert any(i.startswith("LDG.E.128.CONSTANT") for i in code)


def test_definition_is_never_contracted(sm_80):
    scans = {name: code for name, code in sm_80.items() if "scan_kernel" in name}
    assert len(scans) == 3
    for name, code in scans.items():
        # The cosine's division and root are made of DFMA; nothing else may be.
        assert "MetricE1" in name or not any(i.startswith("DFMA") for i in code)


def _after_products(code: list[str], steps: int) -> tuple[int, int]:
    """Instructions from the first product of a tile to the last, and from there to the vote on what is near."""
    products = [at for at, i in enumerate(code) if i.startswith("HMMA")]
    assert len(products) == SCORES // 4 * steps
    vote = next(at for at, i in enumerate(code) if at > products[-1] and i.startswith("VOTE"))
    return products[-1] - products[0] + 1, vote - products[-1]


@pytest.mark.parametrize("kernel", EPILOGUE_PER_SCORE)
def test_instructions_a_score(sm_80, kernel):
    code = next(c for name, c in sm_80.items() if kernel in name and "Li128ELi4ELi2ELi3ELi4ELi2ELi0" in name)
    products, epilogue = _after_products(code, 4)
    assert products / SCORES <= PRODUCTS_PER_SCORE
    assert epilogue / SCORES <= EPILOGUE_PER_SCORE[kernel]


def test_a_bias_in_the_product_leaves_a_maximum_a_score(sm_80):
    """Two epilogues are there, that of tiles with biases beside their operands too; one has no multiply-adds."""
    code = next(c for name, c in sm_80.items() if "lookup_kernel" in name and "Li128ELi4ELi2ELi3ELi2ELi2ELi8" in name)
    products, epilogue = _after_products(code, 2)
    last = max(at for at, i in enumerate(code) if i.startswith("HMMA"))
    counts = collections.Counter(i.split(".")[0] for i in code[last : last + epilogue])
    assert products / SCORES <= PRODUCTS_PER_SCORE
    assert counts["FMNMX"] == 2 * SCORES and counts["FFMA"] <= 1.25 * SCORES
