"""From the tokens of one choice to the pieces of its text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..generation.stop import StopStrings
from ..generation.text_pieces import TextPieces
from ..markup.answer import THOUGHT_END, THOUGHT_START, Marks
from .choice import Choice, Piece

if TYPE_CHECKING:
    from ..engine.results import SequenceOutput


class Transcript:
    """The text of one choice so far.

    Args:
        detokenizer: mlx-lm's, fresh.
        choice: Whose text it is.
        marks: The control tokens that the text tells apart.

    Attributes:
        tokens: The tokens that were reported.
        num_from_draft: How many of the reported ones had been proposed.
        num_reasoning: How many of them belong to thoughts, their marks included.
    """

    def __init__(self, detokenizer: Any, choice: Choice, marks: Marks) -> None:
        stops = StopStrings(choice.stop)
        self._pieces = TextPieces(
            detokenizer, stops, marks, min_tokens=choice.min_tokens
        )
        self.tokens: list[int] = []
        self.num_from_draft = 0
        self.num_reasoning = 0
        self._marks = marks.tokens
        self._is_thought = choice.is_reasoning

    def take(self, output: SequenceOutput) -> Piece:
        """The piece that a round's tokens make; ends with the text."""
        piece = Piece()
        last = len(output.tokens) - 1
        for i, token in enumerate(output.tokens):
            piece.finish_reason = output.finish_reason if i == last else None
            piece.text += self._pieces.add(token, piece.finish_reason)
            piece.tokens.append(token)
            self._note_thought(self._marks.get(token))
            if self._pieces.is_stopped:
                piece.finish_reason, piece.stop = "stop", self._pieces.stop
                break
        self.tokens += piece.tokens
        count = len(piece.tokens)
        piece.logprobs = output.logprobs[:count]
        self.num_from_draft += min(output.num_from_draft, count)
        return piece

    def _note_thought(self, mark: str | None) -> None:
        """Count a token that belongs to a thought."""
        self._is_thought |= mark == THOUGHT_START
        self.num_reasoning += self._is_thought
        self._is_thought &= mark != THOUGHT_END
