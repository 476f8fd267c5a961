"""The masked convolutions against torch's convolution in float64: values and gradients within the rounding of a sum."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from fastvq import ops
from tests.fuzz.ambient import Ambient, ambients
from tests.fuzz.compare import assert_same_bits
from tests.support.tolerance import assert_within, gamma, roundoff

MASKS = ("A", "B", "vertical-A", "vertical-B", "horizontal-A", "horizontal-B", "custom")
CHANNELS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 48)
SERVED = (torch.float32, torch.bfloat16)  # by the C++ kernels
CONDITIONS = ("none", "vector", "map")
GATE = 20 * 2.0**-24  # tanh, sigmoid and their derivatives, relative: 6 roundings each and a few products


def _gaps(t: Tensor) -> Tensor:
    out = torch.full((t.shape[0], t.shape[1] * 2, t.shape[2], t.shape[3] + 2), torch.nan, dtype=t.dtype)
    return out[:, ::2, :, 1:-1].copy_(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "columns first": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "gaps": _gaps,
    "expanded": lambda t: t[:1].expand_as(t),
}


@dataclass(frozen=True)
class ConvCase:
    seed: int
    batch: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    channels: tuple[int, int]  # in, out
    mask: str
    groups: int  # colours
    condition: str | None  # None: no gate
    bias: bool
    dtype: torch.dtype
    masked_weights: float  # what lies where no weight counts
    x_layout: str
    weight_layout: str
    ambient: Ambient

    def tensors(self) -> tuple[list[Tensor | None], Tensor, Tensor]:
        """x, weight, bias and condition; which weights count; the gradient that comes back."""
        rng = np.random.default_rng(self.seed)
        (c_in, c_out), gated = self.channels, self.condition is not None
        c_out *= 1 + gated

        def draw(*shape: int) -> Tensor:
            return torch.from_numpy(rng.standard_normal(shape)).to(self.dtype)

        x, weight = draw(self.batch, c_in, *self.size), draw(c_out, c_in, *self.kernel)
        used = self.used(c_out, c_in, rng)
        weight = torch.where(used, weight, torch.tensor(self.masked_weights).to(self.dtype))
        shapes = {"vector": (self.batch, c_out), "map": (self.batch, c_out, *self.size)}
        condition = draw(*shapes[self.condition]) if self.condition in shapes else None
        if condition is not None and condition.dim() == 4:
            condition = LAYOUTS[self.x_layout](condition)
        grad = draw(self.batch, self.channels[1], *self.size)
        given = [LAYOUTS[self.x_layout](x), LAYOUTS[self.weight_layout](weight), draw(c_out) if self.bias else None]
        return [*given, condition], used, grad

    def taps(self, rng: np.random.Generator) -> np.ndarray:
        kh, kw = self.kernel
        row, column = np.mgrid[:kh, :kw]
        above, same = row < kh // 2, row == kh // 2
        left = same & (column < kw // 2)
        centre = same & (column == kw // 2)
        return {
            "A": above | left,
            "B": above | left | centre,
            "vertical-A": above,
            "vertical-B": above | same,
            "horizontal-A": left,
            "horizontal-B": left | centre,
            "custom": rng.random((kh, kw)) < rng.choice([0, 0.3, 0.9]),
        }[self.mask]

    def used(self, c_out: int, c_in: int, rng: np.random.Generator) -> Tensor:
        used = np.broadcast_to(self.taps(rng), (c_out, c_in, *self.kernel)).copy()
        if self.groups > 1:
            out, seen = np.arange(c_out) * self.groups // c_out, np.arange(c_in) * self.groups // c_in
            before = np.less_equal if self.mask.endswith("B") else np.less
            used[:, :, self.kernel[0] // 2, self.kernel[1] // 2] = before(seen[None], out[:, None])
        return torch.from_numpy(used)

    def run(self, ambient: Ambient, image: int | None = None) -> list[Tensor | None]:
        """The output, of all images or of one; and the gradients of x, weight, bias and condition where there are."""
        given, used, grad = self.tensors()
        if image is not None:
            one = slice(image, image + 1)
            given[0], given[3], grad = given[0][one], None if given[3] is None else given[3][one], grad[one]
        mask = self.mask
        if mask == "custom":  # taps are the same for all channels
            mask = used[0, 0].contiguous()
        # What C++ leaves to the reference would go to Triton's interpreter first, which is for other tests.
        backend = None if self.dtype in SERVED else "reference"
        with ambient.applied():
            leaves = [t if t is None else t.detach().requires_grad_(ambient.takes_gradients) for t in given]
            if self.condition is None:
                out = ops.masked_conv2d(*leaves[:3], mask=mask, colours=self.groups, backend=backend)
            else:
                out = ops.gated_masked_conv2d(*leaves, mask=mask, backend=backend)
            if not ambient.takes_gradients:
                return [out, None, None, None, None]
            grads = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], grad))
        return [out, *(None if t is None else next(grads) for t in leaves)]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))


def check_values(case: ConvCase, results: list[Tensor | None]) -> None:
    given, used, grad = case.tensors()
    work, wide = (torch.float64 if case.dtype == torch.float64 else torch.float32), torch.float64
    grad = grad.double()
    x, weight, bias, condition = (t if t is None else t.to(wide) for t in given)
    weight = torch.where(used, weight, 0)
    leaves = [t if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
    sizes = [t if t is None else t.abs().requires_grad_() for t in (x, weight, bias)]
    y, size = convolve(*leaves), convolve(*sizes)
    n_taps = int(used.any(0).any(0).sum()) * case.channels[0] + 3
    error = gamma(n_taps, work) * size.detach()
    # Directed rounding errs by a whole unit where rounding to nearest errs by half of one.
    slack = 1 if case.ambient.rounding == "nearest" else 2
    kept = slack * roundoff(case.dtype)
    if case.condition is None:
        expected, bound, back, back_error = y, error, grad, torch.zeros_like(y)
    else:
        given = torch.zeros(1, 1, dtype=wide) if condition is None else condition
        condition_map = given if given.dim() == 4 else given[:, :, None, None]
        pre = (y + condition_map).detach()
        error = gamma(n_taps, work) * (size.detach() + condition_map.abs())
        a, b = pre.chunk(2, 1)
        of_a, of_b = error.chunk(2, 1)
        t, s = a.tanh(), b.sigmoid()
        expected, bound = t * s, of_a + of_b / 4 + (GATE + 4 * kept) * (t * s).abs()
        back = torch.cat([grad * s * (1 - t * t), grad * t * s * (1 - s)], 1)
        # As in the unit tests: kept factors are rounded to the dtype, derivatives are at most 1.
        back_error = ((of_a + of_b + GATE + 4.1 * kept) * grad.abs()).repeat(1, 2, 1, 1)
    assert_near(results[0], expected.detach(), slack * bound, kept, "output")

    pixels = case.batch * case.size[0] * case.size[1]
    wanted = [leaf for leaf in leaves if leaf is not None]
    pulled = torch.autograd.grad(y, wanted, back, retain_graph=True)
    n = max(n_taps * case.channels[1] * 2, pixels) + 3
    magnitude = gamma(n, work) * back.abs() + back_error * (1 + gamma(n, work))
    bounds = torch.autograd.grad(size, [t for t in sizes if t is not None], magnitude)
    got = [g for g in results[1:4] if g is not None]
    for name, g, e, m in zip(("x", "weight", "bias"), got, pulled, bounds, strict=False):
        if name == "weight":
            assert not g[~used].any(), "the gradient of a weight that does not count"
            e, m = torch.where(used, e, 0), torch.where(used, m, 0)
        assert_near(g, e, slack * m, kept, f"gradient of {name}")
    if condition is not None:
        vector = condition.dim() == 2
        e, m = (t.sum((2, 3)) if vector else t for t in (back, magnitude))
        assert_near(results[4], e, slack * m, kept, "gradient of condition")


def assert_near(actual: Tensor, expected: Tensor, bound: Tensor, kept: float, what: str) -> None:
    """Within ``bound``, and one rounding of the dtype more; below float16's range, within its smallest number."""
    info = torch.finfo(actual.dtype)
    try:
        assert_within(actual.detach(), expected, bound + kept * (expected.abs() + bound) + info.tiny * info.eps)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


def check(case: ConvCase) -> None:
    results = case.run(case.ambient)
    # The order of a sum is fixed where C++ serves; float16 and float64 are torch's own convolution.
    ours = case.dtype in SERVED
    again = case.run(case.ambient.plain(keep_rounding=True))
    if ours and case.ambient.mode != "autocast":
        for name, a, b in zip(("output", "x", "weight", "bias", "condition"), results, again, strict=True):
            if a is not None:
                assert_same_bits(a, b, f"{name} depends on the state around the call")
    check_values(case, again)
    if ours and case.batch > 1:
        image = case.seed % case.batch
        alone = case.run(case.ambient.plain(keep_rounding=True), image)
        assert_same_bits(alone[0][0], again[0][image], "an image alone differs from it in a batch")


def conv_cases() -> st.SearchStrategy[ConvCase]:
    def fit(channels: tuple[int, int], mask: str, groups: int, condition: str | None, **rest: object) -> ConvCase:
        """Channel groups go with few masks, with no gate, and divide the channels."""
        if condition is not None or mask.startswith("vertical") or mask == "custom":
            groups = 1
        channels = tuple(-(-c // groups) * groups for c in channels)
        return ConvCase(channels=channels, mask=mask, groups=groups, condition=condition, **rest)

    odd = st.sampled_from((1, 3, 5, 7, 11))
    return st.builds(
        fit,
        seed=st.integers(0, 2**32 - 1),
        batch=st.sampled_from((1, 0, 2, 3, 7)),
        size=st.tuples(st.sampled_from((1, 2, 3, 5, 8, 17)), st.sampled_from((1, 2, 3, 7, 15, 16, 17, 33))),
        kernel=st.tuples(odd, odd),
        channels=st.tuples(st.sampled_from(CHANNELS), st.sampled_from(CHANNELS)),
        mask=st.sampled_from(MASKS),
        groups=st.sampled_from((1, 1, 2, 3)),
        condition=st.sampled_from((None, None, *CONDITIONS)),
        bias=st.booleans(),
        dtype=st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)),
        masked_weights=st.sampled_from((0.0, torch.nan, torch.inf, 1e30)),
        x_layout=st.sampled_from(list(LAYOUTS)),
        weight_layout=st.sampled_from(list(LAYOUTS)[:-1]),  # expanded, a weight that counts would be one that does not
        ambient=ambients(),
    )


@pytest.mark.fuzz(weight=3)
def test_values_and_gradients(fuzz):
    fuzz(check, case=conv_cases())
