"""The types of string options list what a module takes, so that an editor can offer it."""

from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from fastvq.models import VQVAE, VQVAE2
from fastvq.nn import GatedMaskedConv2d, MaskedConv2d, ResidualVQ, VectorQuantizer
from fastvq.ops.masked_conv.masks import MASKS

SMALL = {
    VectorQuantizer: (8, 4),
    ResidualVQ: (8, 4, 2),
    VQVAE: (1, 8, 4, 4),
    VQVAE2: (1, 8, 4, 4),
}


def literals(cls):
    """{argument: the strings of its type}."""
    hints = get_type_hints(cls.__init__)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


@pytest.mark.parametrize(("cls", "sizes"), SMALL.items())
def test_every_listed_string_is_taken_and_no_other(cls, sizes):
    options = literals(cls)
    assert options
    for name, strings in options.items():
        for value in strings:
            cls(*sizes, **{name: value})
        with pytest.raises(ValueError) as refused:
            cls(*sizes, **{name: "nothing of the kind"})
        assert all(repr(value) in str(refused.value) or value in str(refused.value) for value in strings)


@pytest.mark.parametrize("cls", [MaskedConv2d, GatedMaskedConv2d])
def test_masks_are_those_of_the_op(cls):
    named, _ = get_args(get_type_hints(cls.__init__)["mask"])
    assert get_args(named) == MASKS
