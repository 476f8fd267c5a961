"""The golden set: calls with known results that run before an unknown GPU is trusted."""
