"""What regard's kernels reach, as ratios measured side by side in one run: ``python -m benchmarks``."""
