"""The sampler's steps against a whole network in float64: every position, from the ids before it alone."""

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
from tests.support.tolerance import assert_within

# Float32 through three layers of numbers about 1, each a few hundred roundings of 2^-24 and a gate that shrinks errors.
CLOSE = 1e-4


@dataclass(frozen=True)
class NetworkCase:
    seed: int
    n_codes: int
    channels: int
    kernels: tuple[int, ...]
    shape: tuple[int, int, int]  # B, H, W
    condition: tuple[int, int] | None  # H and W over the condition's height and width
    transposed: bool
    ambient: Ambient

    def tensors(self) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """Weights, ids and condition."""
        rng = np.random.default_rng(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.from_numpy(rng.standard_normal(shape)).float() * 0.4

        c, k = self.channels, self.n_codes
        weights = [draw(k, c)]
        for i, size in enumerate(self.kernels):
            out = 2 * c if i + 1 < len(self.kernels) else c
            weights += [draw(2 * c, c, size, size), draw(2 * c), draw(2 * c, c, 1, 1), draw(2 * c)]
            weights += [draw(2 * c, c, 1, size), draw(2 * c), draw(out, c, 1, 1), draw(out)]
        weights += [draw(c, c, 1, 1), draw(c), draw(k, c, 1, 1), draw(k)]
        if self.transposed:
            weights = [w.transpose(0, 1).contiguous().transpose(0, 1) if w.dim() > 1 else w for w in weights]
        b, h, w = self.shape
        condition = None
        if self.condition is not None:
            condition = draw(len(self.kernels), b, h // self.condition[0], w // self.condition[1], 4 * c)
        return weights, torch.from_numpy(rng.integers(0, k, self.shape)), condition

    def logits(self) -> Tensor:
        """[B, K, H, W] of the whole network, float64."""
        weights, ids, condition = self.tensors()
        c, (_, height, width) = self.channels, self.shape
        embedding, *rest = (w.double() for w in weights)
        v = h = embedding[ids].movedim(-1, 1)
        skip = torch.zeros(1, dtype=torch.float64)
        for i, size in enumerate(self.kernels):
            of_v, v_bias, link, link_bias, of_h, h_bias, out, out_bias = rest[8 * i : 8 * i + 8]
            rows = torch.arange(size) < size // 2 + (i > 0)  # the first layer does not see its own position
            added = torch.zeros(1, 4 * c, 1, 1, dtype=torch.float64)
            if condition is not None:
                added = condition[i].double().movedim(-1, 1)
                added = added.repeat_interleave(height // added.shape[2], 2).repeat_interleave(
                    width // added.shape[3], 3
                )
            new_v = F.conv2d(v, of_v * rows[:, None], v_bias, padding=size // 2) + added[:, : 2 * c]
            new_v = gate(new_v) + (v if i else 0)
            g = F.conv2d(h, of_h * rows, h_bias, padding=(0, size // 2)) + F.conv2d(new_v, link, link_bias)
            o = F.conv2d(gate(g + added[:, 2 * c :]), out, out_bias)
            skip = skip + o[:, -c:]
            if i + 1 < len(self.kernels):
                h = o[:, :c] + (h if i else 0)
            v = new_v
        first, first_bias, last, last_bias = rest[-4:]
        return F.conv2d(F.conv2d(skip.relu(), first, first_bias).relu(), last, last_bias)

    def run(self, ambient: Ambient) -> Tensor:
        weights, ids, condition = self.tensors()
        rng = np.random.default_rng(self.seed + 1)
        out = torch.full((self.shape[0], self.n_codes, *self.shape[1:]), torch.nan)
        with ambient.applied():
            state = ops.pixelcnn_start(weights, self.kernels, self.shape, condition=condition)
            for row in range(self.shape[1]):
                for column in range(self.shape[2]):
                    seen = ids.clone()  # ids at the position and after it may be anything
                    seen.view(len(ids), -1)[:, row * self.shape[2] + column :] = int(rng.integers(self.n_codes))
                    out[:, :, row, column] = ops.pixelcnn_step(state, seen, row, column)
        return out


def gate(t: Tensor) -> Tensor:
    a, b = t.chunk(2, 1)
    return a.tanh() * b.sigmoid()


@pytest.mark.fuzz(weight=0.5)
def test_logits_of_every_position(fuzz):
    def check(case):
        got, expected = case.run(case.ambient), case.logits()
        assert_within(got, expected, CLOSE * (1 + expected.abs()))
        assert_same_bits(got, case.run(case.ambient.plain(keep_rounding=True)), "depends on the state around the call")

    def fit(shape, over, **rest):
        divides = over is not None and shape[1] % over[0] == 0 and shape[2] % over[1] == 0
        return NetworkCase(shape=shape, condition=over if divides else None, **rest)

    case = st.builds(
        fit,
        seed=st.integers(0, 2**32 - 1),
        n_codes=st.sampled_from((1, 2, 7, 16, 17, 33, 100)),
        channels=st.sampled_from((1, 2, 3, 8, 15, 16, 17, 33)),
        kernels=st.lists(st.sampled_from((1, 3, 5, 7)), min_size=1, max_size=3).map(tuple),
        shape=st.tuples(st.sampled_from((1, 2, 3, 9)), st.sampled_from((1, 2, 4)), st.sampled_from((1, 2, 3, 6))),
        over=st.sampled_from((None, (1, 1), (2, 1), (1, 2), (2, 3), (4, 6))),
        transposed=st.booleans(),
        ambient=ambients(),
    )
    fuzz(check, case=case)
