"""From data files to records: the text is chosen, written by the target, recorded.

Everything is a function of the data, the settings and the target, and is done in small
groups: a run that was cut off finds the groups that are there.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import DataError
from ...models.target import Target
from ...pair.pair import Pair
from ...sampling.params import SamplingParams
from ..data.documents import Document, is_held_out
from ..request import TextSettings
from .records import Recorder, Records
from .texts import Text, given_texts, own_texts

_HELD_OUT_EVERY = 16  # of the data's sources, where no files to judge by are named
_ENOUGH_SOURCES = 34  # of which one is held out to judge by and one for the report
# So many texts made up for what fine-tuning had lost (docs/tuning.md, "Measured").
_ENOUGH_TEXTS = 600
_FEW_TEXTS = 100


@dataclass(frozen=True)
class Chosen:
    """The documents of a run.

    Attributes:
        train: To learn from.
        judged: To judge weights by while they are trained; of other sources.
        reported: To measure the result on: what has chosen the best weights would
            flatter them.
        num_found: Texts in the data, files to judge by among it.
    """

    train: list[Document]
    judged: list[Document]
    reported: list[Document]
    num_found: int

    @property
    def is_judge_reported(self) -> bool:
        """Whether there is too little held out for two."""
        return self.judged is self.reported

    @property
    def amount(self) -> str:
        """How much text there is, and how much it takes, in a line."""
        few = ""
        if len(self.train) < _FEW_TEXTS:
            few = ": these are few, and may bring little"
        return (
            f"the data has {self.num_found:,} texts: {len(self.train):,} to learn "
            f"from, {len(self.judged):,} to judge by; 1 of each is needed, "
            f"{_ENOUGH_TEXTS} to learn from were enough where it was measured{few}"
        )

    @property
    def digest(self) -> str:
        """A text that differs for other documents."""
        both = [
            [[document.prompt, document.rest, document.kind] for document in part]
            for part in (self.train, self.judged, self.reported)
        ]
        return hashlib.sha256(json.dumps(both).encode()).hexdigest()


def choose(
    data: Iterable[Document],
    held_out: Iterable[Document] | None,
    settings: TextSettings,
    seed: int,
) -> Chosen:
    """Choose documents at random; all are read, so all mistakes in them are found.

    Args:
        data: To learn from.
        held_out: To judge by; None for a part of the data's sources.
        settings: How many.
        seed: Of the choice.

    Raises:
        DataError: There is too little data.
    """
    train = _Sample(settings.num_texts, seed)
    held = [_Sample(settings.num_held_out, seed) for _ in range(2)]
    sides: dict[int, int] = {}  # of each source that is held out, by turns

    def hold_out(document: Document) -> None:
        side = sides.setdefault(document.source, len(sides) % 2)
        held[side].add(document)

    num_sources = num_found = 0
    for document in data:
        num_sources, num_found = document.source + 1, num_found + 1
        if held_out is None and is_held_out(document.source, every=_HELD_OUT_EVERY):
            hold_out(document)
        else:
            train.add(document)
    for document in held_out or ():
        num_found += 1
        hold_out(document)
    judged = held[0].chosen
    seen = _prompts(judged)
    reported = [text for text in held[1].chosen if tuple(text.prompt) not in seen]
    # What is judged by must not have been learnt, also where the data repeats itself.
    seen |= _prompts(reported)
    learnt = [text for text in train.chosen if tuple(text.prompt) not in seen]
    if not judged:
        raise DataError(
            f"the data must have texts to judge by, of records (or, of plain text, "
            f"blocks of 16 kB) that are held out, one in {_HELD_OUT_EVERY}: got "
            f"{num_found:,} texts in {num_sources:,} of them. Add more data, so that "
            f"there are {_ENOUGH_SOURCES}, or name --held-out files."
        )
    if not learnt:
        raise DataError(
            f"the data must have texts to learn from: got {num_found:,} texts, none "
            "that is not held out too. Add more data, or name other --held-out files."
        )
    return Chosen(learnt, judged, reported or judged, num_found)


def _prompts(documents: Iterable[Document]) -> set[tuple[int, ...]]:
    return {tuple(document.prompt) for document in documents}


class _Sample:
    """A random sample of a stream (Vitter 1985, algorithm R), in random order."""

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._random = random.Random(seed)
        self._seen = 0
        self._kept: list[Document] = []

    def add(self, document: Document) -> None:
        """One more of the stream."""
        self._seen += 1
        if len(self._kept) < self._count:
            self._kept.append(document)
            return
        place = self._random.randrange(self._seen)
        if place < self._count:
            self._kept[place] = document

    @property
    def chosen(self) -> list[Document]:
        """The sample."""
        kept = list(self._kept)
        random.Random(self._seen).shuffle(kept)
        return kept


@dataclass(frozen=True)
class Writing:
    """Makes a record of every document whose continuation has something to foretell.

    Attributes:
        documents: The documents.
        folder: Where records go; groups that are there are left as they are.
        prefix: Of the records' names.
        params: How tokens are drawn.
        settings: How texts are made.
    """

    documents: Sequence[Document]
    folder: Path
    prefix: str
    params: SamplingParams
    settings: TextSettings

    @property
    def starts(self) -> Sequence[int]:
        """The first document of each group that is written together."""
        return range(0, len(self.documents), self.settings.num_rows)

    @property
    def missing(self) -> list[Document]:
        """The documents that no record was made of yet."""
        records = Records(self.folder)
        return [
            document
            for i, document in enumerate(self.documents)
            if not records.is_done(self._name(i))
        ]

    @property
    def names(self) -> list[str]:
        """The names of the records that are there."""
        records = Records(self.folder)
        names = map(self._name, range(len(self.documents)))
        return [name for name in names if name in records]

    def group(self, start: int) -> Sequence[Document]:
        """The documents that are written together from one on."""
        return self.documents[start : start + self.settings.num_rows]

    def is_done(self, start: int) -> bool:
        """Whether all records of a group are there."""
        records = Records(self.folder)
        names = range(start, start + len(self.group(start)))
        return all(records.is_done(self._name(i)) for i in names)

    def write(self, pair: Pair, start: int) -> None:
        """Make the records of a group, all of them."""
        records = Records(self.folder)
        group = self.group(start)
        names = [self._name(start + i) for i in range(len(group))]
        step_size = self.settings.step_size
        recorder = Recorder(Target(pair.target), self.params, step_size=step_size)
        with pair.wired():
            for name, text in zip(names, self._texts(pair, group, start), strict=True):
                # The first token behind a prompt is no draft's.
                if len(text.tokens) - text.num_prompt_tokens < 2:
                    records.skip(name)
                else:
                    records.write(name, recorder.record(text))

    def _texts(self, pair: Pair, group: Sequence[Document], start: int) -> list[Text]:
        """The texts of a group; each document has a seed of its own."""
        if not self.settings.generate:
            return list(given_texts(group))
        return own_texts(
            pair,
            group,
            replace(self.params, seed=(self.params.seed or 0) + start),
            max_tokens=self.settings.max_tokens,
            step_size=self.settings.step_size,
        )

    def _name(self, index: int) -> str:
        return f"{self.prefix}-{index:06d}"


def write_all(
    writing: Writing, pair: Pair, on_progress: Callable[[int], None]
) -> list[str]:
    """Make all records.

    Args:
        writing: What is to be made.
        pair: The target.
        on_progress: Called with the number of documents done.

    Returns:
        The records' names.
    """
    missing = [start for start in writing.starts if not writing.is_done(start)]
    num_done = len(writing.documents) - sum(len(writing.group(s)) for s in missing)
    on_progress(num_done)
    for start in missing:
        writing.write(pair, start)
        num_done += len(writing.group(start))
        on_progress(num_done)
    return writing.names
