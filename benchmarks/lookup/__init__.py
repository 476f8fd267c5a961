"""The lookup benchmark: cases, peers, measuring, plots."""
