"""An answer on a screen: thoughts apart from what is said, and what comes before it.

In a terminal thoughts are dimmed. Where standard output is a file or a pipe, a program
reads it: thoughts are left out there unless they are asked for.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from typing import TextIO

from ..markup.answer import REASONING, Part
from .command import progress_bar

_DIM, _PLAIN = "\033[2m", "\033[0m"
_GAP = "\n\n"  # between a thought and what follows
_PATIENCE_S = 1.0  # until someone wonders whether anything happens
_BETWEEN_S = 0.25  # two drawings


class Display:
    """Writes one answer as it comes; calls of tools are none of its parts.

    Args:
        out: Standard output.
        shows_thoughts: Whether thoughts are written also where it is no terminal.

    Attributes:
        has_content: Whether something was said, not only thought.
    """

    def __init__(self, out: TextIO, *, shows_thoughts: bool = False) -> None:
        is_terminal = out.isatty()
        has_colors = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._out = out
        self._shows_thoughts = shows_thoughts or is_terminal
        self._marks = (_DIM, _PLAIN) if is_terminal and has_colors else ("", "")
        self._is_thought = False
        self._has_gap = True  # nothing needs to be told apart yet
        self.has_content = False

    def show(self, parts: Iterable[Part]) -> None:
        """Write what comes next."""
        for part in parts:
            is_thought = part.kind == REASONING
            self.has_content |= not is_thought
            if is_thought and not self._shows_thoughts:
                continue
            self._turn(is_thought)
            self._out.write(part.text)
            self._has_gap = False
        self._out.flush()

    def cut_off(self, num_tokens: int, why: str | None = None) -> str:
        """What to say of an answer that has no end, one line."""
        is_thought = not self.has_content
        usual = "see --max-tokens" + (", or --thinking off" if is_thought else "")
        what = "cut off while thinking," if is_thought else "cut off"
        return f"({what} after {num_tokens} tokens; {why or usual})"

    def end(self) -> None:
        """End the line."""
        if self._is_thought:
            self._out.write(self._marks[1])
        self._out.write("\n")
        self._out.flush()

    def _turn(self, is_thought: bool) -> None:
        """Begin or end a thought."""
        if is_thought == self._is_thought:
            return
        self._is_thought = is_thought
        if not is_thought:
            self._out.write(self._marks[1])
        if not self._has_gap:
            self._out.write(_GAP)
        if is_thought:
            self._out.write(self._marks[0])


class PromptProgress:
    """Shows how far a prompt was read, where that takes long and someone looks on.

    A thread draws it: a chunk of a long prompt may take a slow machine half a minute.

    Args:
        notes: Standard error; where it is no terminal, or a simple one, nothing is
            shown: what cannot be taken back would stand before the text.
    """

    def __init__(self, notes: TextIO) -> None:
        self._notes = notes
        self._is_shown = notes.isatty() and os.environ.get("TERM") != "dumb"
        self._num_read = 0
        self._has_ended = threading.Event()
        self._drawing: threading.Thread | None = None

    def tell(self, num_read: int, num_tokens: int) -> None:
        """Take the prompt's tokens that were read so far, and all of them."""
        self._num_read = num_read
        if num_read == num_tokens:
            self.end()
        elif self._drawing is None and self._is_shown:
            self._has_ended.clear()
            self._drawing = threading.Thread(
                target=self._draw, args=(num_tokens, time.time()), daemon=True
            )
            self._drawing.start()

    def end(self) -> None:
        """Take it off the screen."""
        self._has_ended.set()
        if self._drawing is not None:
            self._drawing.join()
            self._drawing = None

    def _draw(self, num_tokens: int, start_s: float) -> None:
        if self._has_ended.wait(_PATIENCE_S):
            return
        with progress_bar(
            "Reading the prompt",
            num_tokens,
            self._notes,
            initial=self._num_read,
            unit=" tokens",
            leave=False,
        ) as bar:
            bar.initial, bar.start_t = 0, start_s  # its rate is that from the start
            while not self._has_ended.wait(_BETWEEN_S):
                bar.n = self._num_read
                bar.refresh()
