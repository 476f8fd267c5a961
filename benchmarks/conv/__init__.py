"""Masked convolution and sampling: cases, peers, measuring."""
