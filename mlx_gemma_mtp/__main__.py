"""``python -m mlx_gemma_mtp``: the same as ``python -m mlx_gemma_mtp.generate``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
