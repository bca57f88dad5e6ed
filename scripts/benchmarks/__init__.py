"""What scripts/bench.py measures with, by noun."""
