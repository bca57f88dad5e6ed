"""Mistakes a user can fix. Knows nothing else of the package.

Whatever stands in front of the user (command line, server) shows an ``MTPError``
as its one line of text and exits with status 1; a traceback would only hide it.
"""

from typing import Any

# Words of MLX's allocators and of Metal's watchdog, such as "Resource limit exceeded"
# of malloc, "GPU Timeout", "Innocent Victim".
_OF_OTHERS = ("malloc", "memory", "allocat", "timeout", "interactivity", "victim")
_MOST = 1000  # characters of a message: what is longer holds somebody's whole input


class MTPError(Exception):
    """A mistake a user can fix; ``str(error)`` is the whole message, one line.

    Args:
        message: The message. Line ends in it, which names in damaged files may have,
            become spaces; of a very long one the middle is left out.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        if len(line) > _MOST:
            half = _MOST // 2 - 2
            line = f"{line[:half]}...{line[-half:]}"
        super().__init__(line)


class CheckpointError(MTPError):
    """A checkpoint that cannot be found, read or understood."""


class PairingError(MTPError):
    """A drafter that does not fit its target."""


class RequestError(MTPError, ValueError):
    """A request with a setting outside its range."""


class KernelError(MTPError):
    """A round that failed, and took its request's caches with it."""


class DataError(MTPError):
    """Training data that cannot be read or used."""


class OutputError(MTPError):
    """A place that cannot be written, or that holds something already."""


class RanksError(MTPError):
    """Ranks that are out of step, or that have lost each other."""


class HookError(MTPError):
    """An mlx-lm that the load hook does not know."""


def shorten(value: Any, *, nothing: str = "nothing") -> str:
    """A value for a message, at most 80 characters of it."""
    try:
        text = nothing if value is None else repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        text = "a number of thousands of digits"
    except RecursionError:
        text = "something nested too deeply"
    return text if len(text) <= 80 else f"{text[:77]}..."


def cut(text: object) -> str:
    """A text of any length for a message, such as a path: its beginning and its end."""
    whole = str(text)
    return whole if len(whole) <= 240 else f"{whole[:100]}...{whole[-137:]}"


def described(error: BaseException) -> str:
    """Somebody else's error on one line: what it is and the beginning of what it says.

    A compiler says far more, and over many lines.
    """
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 (its own words may be wrong, too)
        text = "(no words)"
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}"


def is_of_others(error: BaseException) -> bool:
    """Whether an error of MLX tells nothing of kernels: no memory, or a taken GPU."""
    text = str(error).lower()
    return any(word in text for word in _OF_OTHERS)
