"""What all commands share, and the first of them: ``mlx_gemma_mtp.generate``."""
