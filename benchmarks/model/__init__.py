"""The reference model: quality, speed and the peers' networks."""
