"""What the figures in docs/benchmarks.md come from: `python -m bench NAME`, from the root."""
