"""Codebook learning: peers and measuring of statistics and training steps."""
