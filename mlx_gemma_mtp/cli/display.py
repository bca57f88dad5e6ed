"""An answer on a screen: thoughts apart from what is said, and what comes before it.

In a terminal thoughts are dimmed. Where standard output is a file or a pipe, a program
reads it: thoughts are left out there unless they are asked for.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TextIO

from ..cpu_kernels import num_compiled, num_kept
from ..markup.answer import REASONING, Part
from .command import progress_bar

_DIM, _PLAIN = "\033[2m", "\033[0m"
_GAP = "\n\n"  # between a thought and what follows
_PATIENCE_S = 1.0  # until someone wonders whether anything happens
_BETWEEN_S = 0.25  # two drawings
_QUIET_S = 4.0  # without a new kernel: a slow machine takes as long for one
# For a terminal: the place is remembered, and what is too long is cut at the edge.
_BEHIND = "\0337\033[?7l{}{}{}\033[K\0338\033[?7h"
_ERASE = "\033[K"
# What the embedded pair needs for its first text; others need as many or more.
_USUAL_KERNELS = 100


class Display:
    """Writes one answer as it comes; calls of tools are none of its parts.

    Args:
        out: Standard output.
        shows_thoughts: Whether thoughts are written also where it is no terminal.
        compiling: What may stand behind the text, and goes before more is written;
            None for nothing.

    Attributes:
        has_content: Whether something was said, not only thought.
    """

    def __init__(
        self,
        out: TextIO,
        *,
        shows_thoughts: bool = False,
        compiling: CompileProgress | None = None,
    ) -> None:
        is_terminal = out.isatty()
        self._out = out
        self._alone = nullcontext if compiling is None else compiling.hidden
        self._shows_thoughts = shows_thoughts or is_terminal
        self._marks = _marks(out)
        self._is_thought = False
        self._has_gap = True  # nothing needs to be told apart yet
        self.has_content = False

    def show(self, parts: Iterable[Part]) -> None:
        """Write what comes next."""
        with self._alone():
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


class CompileProgress:
    """Shows that MLX compiles kernels, behind the text that waits for them.

    So it is on a CPU, once for every kernel. Where there is nothing to compile, or
    standard error is no terminal, nothing is shown. A context: it watches meanwhile.

    Args:
        notes: Standard error.
    """

    def __init__(self, notes: TextIO) -> None:
        self._notes = notes
        self._marks = _marks(notes)
        self._has_ended = threading.Event()
        self._lock = threading.Lock()  # held by who writes to the terminal
        self._is_shown = False
        self._watching: threading.Thread | None = None

    def __enter__(self) -> CompileProgress:
        if self._notes.isatty() and os.environ.get("TERM") != "dumb":
            self._watching = threading.Thread(target=self._watch, daemon=True)
            self._watching.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._has_ended.set()
        if self._watching is not None:
            self._watching.join()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """While something else is written."""
        with self._lock:
            self._hide()
            yield

    def _watch(self) -> None:
        before, quiet = num_compiled(), 0
        while not self._has_ended.wait(_BETWEEN_S):
            number = num_compiled()
            quiet = 0 if number > before else quiet + 1
            before = number
            with self._lock:
                if not quiet:
                    self._show(number)
                elif quiet * _BETWEEN_S > _QUIET_S:
                    self._hide()
        with self._lock:
            self._hide()

    def _show(self, number: int) -> None:
        is_first = 2 * num_kept() < _USUAL_KERNELS
        usual = _USUAL_KERNELS - num_kept()
        of_all = f" of about {usual}" if is_first and number < usual else ""
        dim, plain = self._marks
        text = f"[compiling kernels for this CPU, once: {number}{of_all}]"
        self._write(_BEHIND.format(dim, text, plain))
        self._is_shown = True

    def _hide(self) -> None:
        if self._is_shown:
            self._write(_ERASE)
            self._is_shown = False

    def _write(self, text: str) -> None:
        self._notes.write(text)
        self._notes.flush()


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


def _marks(out: TextIO) -> tuple[str, str]:
    """What dims what stands between, on a terminal that can."""
    has_colors = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return (_DIM, _PLAIN) if out.isatty() and has_colors else ("", "")
