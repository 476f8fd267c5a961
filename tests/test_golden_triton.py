"""The golden set by the Triton kernels: it passes, and launches nothing that the call it is for would not launch."""

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")
from triton.runtime import interpreter

from fastvq.backends import triton as triton_backend
from fastvq.backends.golden import gate
from fastvq.backends.golden.cases import configuration
from fastvq.ops import residual
from fastvq.ops.nearest import reference
from fastvq.ops.residual.call import ResidualCall

if not triton_backend.interpreting():
    pytest.skip("the interpreter is used where there is no GPU", allow_module_level=True)
from fastvq.ops.nearest import triton_ops as lookup
from fastvq.ops.residual import triton_ops as levels

# Arguments by whose value the kernels are not compiled: their do_not_specialize.
ANY = {"n_rows", "n_blocks", "slab", "i_stride_h", "n_parts", "n_levels", "n_programs"}


@pytest.fixture
def launched(monkeypatch):
    """The kernels launched so far, each with what the compiler would make a binary for."""
    found = set()
    run = interpreter.GridExecutor.__call__

    def kind(value):
        if isinstance(value, torch.Tensor):
            return value.dtype
        return (value % 16 == 0, value == 1) if isinstance(value, int) else type(value)

    def note(self, *arguments, **constants):
        named = zip(self.arg_names, arguments, strict=False)  # the constants come by name
        kinds = tuple((name, kind(value)) for name, value in named if name not in ANY)
        found.add((self.fn.__name__, kinds, tuple(sorted(constants.items()))))
        return run(self, *arguments, **constants)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", note)
    return found


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize(
    ("x", "codebook", "metric"),
    [
        (torch.ones(50, 20), torch.ones(1024, 20), "euclidean"),
        (torch.ones(50, 20).double(), torch.ones(1000, 20), "dot"),
        (torch.ones(40, 16).bfloat16(), torch.ones(300, 16).bfloat16(), "cosine"),
        (torch.ones(2, 30, 16).half(), torch.ones(2, 512, 16), "dot"),
        (torch.ones(50, 8), torch.ones(300, 8), "euclidean"),  # few enough for the definition, with no filter
        (torch.ones(50, 8), torch.ones(600, 8), "euclidean"),
    ],
)
def test_a_lookup_launches_its_own_kernels_alone(x, codebook, metric, precision, launched):
    lookup.nearest(x, codebook, metric, precision)
    own = launched.copy()
    call = configuration(x, codebook, metric, precision)
    assert gate._run("lookup", x.device, lookup.nearest, reference.nearest, call) is None
    assert own and launched == own


@pytest.mark.parametrize(
    ("n_levels", "masked", "precision"), [(4, False, "exact"), (3, True, "fast"), (1, True, "exact")]
)
def test_residual_levels_launch_their_own_kernels_alone(n_levels, masked, precision, launched):
    x, codebooks = torch.ones(40, 20), torch.ones(n_levels, 320, 20)
    mask = torch.ones(40, dtype=torch.bool) if masked else None
    levels.residual_quantize(ResidualCall(x, codebooks, mask, "euclidean", "none", 1.0, False, precision, None))
    own = launched.copy()
    n_levels = min(2, n_levels)
    call = configuration(x, codebooks, "euclidean", precision, n_levels, masked)
    run, right = (
        residual._golden_levels(forward, n_levels, masked)
        for forward in (levels.residual_quantize, residual.RESIDUAL_QUANTIZE.kernels["reference"].run)
    )
    assert gate._run("residual_quantize", x.device, run, right, call) is None
    assert own and launched == own
