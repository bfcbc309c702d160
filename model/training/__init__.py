"""The trainer: optimizer, schedules, the step and its CUDA graph, checkpoints, metrics."""
