"""``python -m mlx_gemma_mtp.generate``; the function of this name is in ``text``."""

from .cli.generate import main

if __name__ == "__main__":
    raise SystemExit(main())
