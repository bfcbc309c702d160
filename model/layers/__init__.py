"""The parts of the model, one a file. Every part that streams carries a small state dataclass."""
