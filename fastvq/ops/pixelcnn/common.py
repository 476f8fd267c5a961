"""Constants that the backends of the sampler share."""

__all__ = ["PER_LAYER", "WIDEST_CHOICE"]

# Tensors of a layer: weight and bias of its vertical convolution, link, horizontal convolution and output.
PER_LAYER = 8
WIDEST_CHOICE = 4096  # ids that triton_choice.py chooses from: a program holds all of them
