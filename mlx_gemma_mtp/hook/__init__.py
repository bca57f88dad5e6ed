"""mlx-lm's own functions, batches and programs with drafters."""
