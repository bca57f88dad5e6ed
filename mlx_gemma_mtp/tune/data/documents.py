"""Data files to documents: a prompt's tokens, and those that follow in the data.

``.jsonl`` files hold a record a line, all others are plain text. Files are read as a
stream; at any time one line and one block of text is in memory, with its tokens. Knows
nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError, RequestError
from ...generation.encoding import encode_text
from .conversations import Conversations
from .lines import Place, read_lines
from .records import (
    ChatRecord,
    PromptRecord,
    Record,
    TextRecord,
    parse_record,
    prompt_as_chat,
)

MIN_TOKENS = 8  # a shorter stretch of text teaches nothing
MIN_REST = 2
# A block is what is held out as one, so it is small; yet it holds a few windows.
_MIN_BLOCK = 16 * 2**10
_BLOCK_PER_TOKEN = 16  # characters: of English text four windows
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio
_Pair = tuple[list[int], list[int]]  # tokens of a prompt, and those that follow
_MEND = "Mend or remove the record."


@dataclass(frozen=True)
class Document:
    """A prompt, and how the data goes on behind it.

    Attributes:
        kind: The kind of text, for the report: the record's own, else the file's name.
        source: Number of the record or block of text that it comes from, over all
            files, for ``is_held_out``.
        prompt: Token ids, at least one.
        rest: The token ids that follow, at least ``MIN_REST``; empty where the target
            is to go on.
    """

    kind: str
    source: int
    prompt: list[int]
    rest: list[int]


@dataclass(frozen=True)
class Lengths:
    """How long documents are.

    Attributes:
        prompt_tokens: Tokens of plain text that make a prompt, the begin-of-sequence
            token among them.
        max_tokens: Most tokens that follow a prompt.
        context: Most tokens that the target takes.

    Raises:
        RequestError: One is too small for the others.
    """

    prompt_tokens: int
    max_tokens: int
    context: int

    def __post_init__(self) -> None:
        self._check_least("prompt_tokens", self.prompt_tokens, MIN_TOKENS)
        self._check_least("max_tokens", self.max_tokens, MIN_REST)
        total = self.prompt_tokens + self.max_tokens
        if total > self.context:
            raise RequestError(
                f"prompt_tokens and max_tokens must be at most the context of "
                f"{self.context:,} tokens together: got {total:,}. Lower one of them."
            )

    @staticmethod
    def _check_least(name: str, value: int, least: int) -> None:
        if value < least:
            raise RequestError(
                f"{name} must be {least} or more: got {value}. Raise it."
            )


def is_held_out(source: int, *, every: int) -> bool:
    """Whether a source is kept for judging: about one of ``every``, evenly spread.

    The multiples of the golden ratio have no period, so that data in which kinds of
    text take turns is held out in the same proportion.

    Args:
        source: ``Document.source``.
        every: 1 or more.
    """
    return (source + 1) * _GOLDEN % 2**64 < 2**64 // every


class DocumentReader:
    """Reads data files as documents.

    Args:
        tokenizer: mlx-lm's, of the target.
        lengths: How long documents are.
        generate: Whether the target goes on itself: documents are prompts alone then.
        chat_template_config: More arguments for the chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        lengths: Lengths,
        *,
        generate: bool,
        chat_template_config: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._lengths = lengths
        self._generate = generate
        self._conversations = Conversations(tokenizer, chat_template_config or {})
        window = lengths.prompt_tokens + lengths.max_tokens
        self._block = max(_MIN_BLOCK, _BLOCK_PER_TOKEN * window)

    def read(self, paths: Iterable[str | Path]) -> Iterator[Document]:
        """Read files, in the order given.

        Stretches of text of less than ``MIN_TOKENS`` tokens are left out.

        Args:
            paths: The files.

        Yields:
            Documents; those of one source follow one another.

        Raises:
            DataError: A file cannot be read or used: one line, with the file and the
                number of the line.
        """
        num_sources = 0
        for path in map(Path, paths):
            num_before, num_documents = num_sources, 0
            for kind, pairs in self._sources(path):
                for prompt, rest in pairs:
                    num_documents += 1
                    yield Document(kind, num_sources, prompt, rest)
                num_sources += 1
            if not num_documents:
                raise _nothing_in(path, has_text=num_sources > num_before)

    def _sources(self, path: Path) -> Iterator[tuple[str, Iterator[_Pair]]]:
        """The sources of a file: the kind of each, and its documents' tokens."""
        if path.suffix.lower() == ".jsonl":
            for place, line in read_lines(path):
                if line.strip():
                    record, kind = parse_record(line, place)
                    yield kind or _kind_of(path), self._pairs(record, place)
        else:
            lines = (line.replace("\r\n", "\n") for _, line in read_lines(path))
            for block in _blocks(lines, self._block):
                if block.strip():
                    yield _kind_of(path), self._windows(block)

    def _pairs(self, record: Record, place: Place) -> Iterator[_Pair]:
        """What a record's documents consist of."""
        try:
            if isinstance(record, TextRecord):
                for block in _blocks([record.text], self._block):
                    yield from self._windows(block)
            else:
                yield self._pair(record, place)
        except UnicodeEncodeError as error:
            found = "half of a surrogate pair"
            raise place.error("the record", "Unicode text", found, _MEND) from error

    def _windows(self, text: str) -> Iterator[_Pair]:
        """Cut a text to windows; that of its end may be shorter than the others.

        Raises:
            UnicodeEncodeError: The text has half of a character.
        """
        tokens = self._begun(text)
        begin = tokens[:1] if tokens[:1] == [self._tokenizer.bos_token_id] else []
        body = tokens[len(begin) :]
        num_prompt = self._lengths.prompt_tokens - len(begin)
        num_rest = 0 if self._generate else self._lengths.max_tokens
        for start in range(0, len(body), num_prompt + num_rest):
            window = body[start : start + num_prompt + num_rest]
            if len(begin) + len(window) < MIN_TOKENS:
                return
            # Half of what is left at the end of a text, but of a whole window all.
            cut = min(num_prompt, max(len(window) // 2, len(window) - num_rest))
            yield begin + window[:cut], window[cut:]

    def _pair(self, record: PromptRecord | ChatRecord, place: Place) -> _Pair:
        """The tokens of a record that has a prompt."""
        if isinstance(record, ChatRecord):
            prompt, rest = self._chat_pair(record, place)
        elif not self._generate and record.completion is None:
            constraint = 'beside a "completion", to learn without generating'
            raise place.error("the prompt", constraint, "none", "Add or remove it.")
        elif self._tokenizer.has_chat_template:
            prompt, rest = self._chat_pair(prompt_as_chat(record), place)
        else:
            prompt, rest = self._raw_pair(record)
        self._check(prompt, rest, place)
        return prompt, rest

    def _chat_pair(self, record: ChatRecord, place: Place) -> _Pair:
        """A conversation up to the answer, and the answer."""
        if self._generate:
            return self._begun(self._conversations.prompt(record, place)), []
        prompt, answer = self._conversations.split(record, place)
        # Apart, as decoding has it: a prompt's last token never grows.
        return self._begun(prompt), self._up_to_end(self._encode(answer))

    def _raw_pair(self, record: PromptRecord) -> _Pair:
        """A prompt as it is, and an answer that ends."""
        prompt = self._begun(record.prompt)
        if self._generate or record.completion is None:
            return prompt, []
        rest = self._encode(record.completion)
        if self._tokenizer.eos_token_id is not None:
            rest.append(self._tokenizer.eos_token_id)
        return prompt, self._up_to_end(rest)

    def _begun(self, text: str) -> list[int]:
        """Token ids of a text that other ones follow.

        Raises:
            UnicodeEncodeError: The text has half of a character.
        """
        text.encode()
        return encode_text(self._tokenizer, text)

    def _encode(self, text: str) -> list[int]:
        """Token ids of a text that follows other ones.

        Raises:
            UnicodeEncodeError: The text has half of a character.
        """
        text.encode()
        return encode_text(self._tokenizer, text, continues=True)

    def _up_to_end(self, rest: list[int]) -> list[int]:
        """An answer up to its end-of-sequence token, behind which nothing is read."""
        ends = self._tokenizer.eos_token_ids
        length = next((i + 1 for i, t in enumerate(rest) if t in ends), len(rest))
        return rest[:length]

    def _check(self, prompt: list[int], rest: list[int], place: Place) -> None:
        """Check that a record's tokens are enough, and not too many."""
        if not prompt:
            raise place.error("the prompt", "at least one token", "none", _MEND)
        if not self._generate and len(rest) < MIN_REST:
            constraint = f"at least {MIN_REST} tokens to learn without generating"
            found = str(len(rest)) if rest else "none"
            raise place.error("the answer", constraint, found, _MEND)
        num_rest = self._lengths.max_tokens if self._generate else len(rest)
        if len(prompt) + num_rest <= self._lengths.context:
            return
        raise place.error(
            "the record",
            f"no longer than the context of {self._lengths.context:,} tokens",
            f"{len(prompt):,} tokens of prompt and {num_rest:,} "
            + ("to generate" if self._generate else "of answer"),
            "Shorten or remove it"
            + (", or generate fewer tokens." if self._generate else "."),
        )


def _blocks(texts: Iterable[str], size: int) -> Iterator[str]:
    """Join texts to blocks of about ``size`` characters, and cut those far longer."""
    pending: list[str] = []
    length = 0
    for text in texts:
        for start in range(0, len(text), size):
            pending.append(text[start : start + size])
            length += len(pending[-1])
            if length >= size:
                yield "".join(pending)
                pending, length = [], 0
    if pending:
        yield "".join(pending)


def _kind_of(path: Path) -> str:
    """A file's name without its ending, as a report can show it."""
    return "".join(c if c.isprintable() else "?" for c in path.stem)


def _nothing_in(path: Path, *, has_text: bool) -> DataError:
    found = "only shorter ones" if has_text else "none"
    constraint = f"at least one text of {MIN_TOKENS} tokens"
    return Place(path).error("the data", constraint, found, "Leave the file out.")
