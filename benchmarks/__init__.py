"""What an optimizer step costs, beside the peers that are installed: ``python -m benchmarks``."""
