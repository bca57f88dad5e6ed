"""``python -m mlx_gemma_mtp.run``; the command is in ``hook``."""

import sys

from .hook.run import main

if __name__ == "__main__":
    sys.exit(main())
