"""Quantizers of other packages before and after the patch: the cases."""
