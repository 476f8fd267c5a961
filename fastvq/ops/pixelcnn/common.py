"""The order of the sampler's weights, which its backends share."""

__all__ = ["PER_LAYER"]

# Tensors of a layer: weight and bias of its vertical convolution, link, horizontal convolution and output.
PER_LAYER = 8
