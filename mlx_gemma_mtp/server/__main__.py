"""The ``mlx_gemma_mtp.server`` command: parse, serve, exit status.

Everything goes to standard error. A mistake of the user's is one line and exit status
1. SIGTERM or Control-C lets running requests finish; a second one ends at once.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from ..cli.command import exit_status
from ..distributed.alone import check_alone
from ..errors import RequestError
from .arguments import configure_parser, parse

__all__ = ["configure_parser", "main"]

_NEEDED = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "prometheus_client": "prometheus-client",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None for the process's.

    Returns:
        Exit status: 0 after a shutdown, 1 for a mistake of the user's, 2 where the
        server failed, 130 for a Control-C before it was up.
    """
    return exit_status(lambda: _run(argv), sys.stdout, sys.stderr)


def _run(argv: Sequence[str] | None) -> int:
    """Check, then serve."""
    settings = parse(argv)
    check_alone("the server")
    _check_packages()
    # Heavy imports wait until the arguments are known to be good.
    from .serve import serve

    return serve(settings)


def _check_packages() -> None:
    """Find out whether everything is installed that the server needs.

    Raises:
        RequestError: It is not.
    """
    missing = [
        package
        for module, package in _NEEDED.items()
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise RequestError(
            f"the server needs {', '.join(missing)}: not installed. pip install "
            "'mlx_gemma_mtp[server]' brings it."
        )


if __name__ == "__main__":
    raise SystemExit(main())
