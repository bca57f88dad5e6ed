"""From data files to records: the text is chosen, written by the target, recorded.

Everything is a function of the data, the settings and the target, and is done in small
groups: a run that was cut off finds the groups that are there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ..config import SamplingParams
from ..errors import DataError
from ..pair import Pair
from ..target import Target
from .documents import Document, is_held_out
from .recording import Recorder, Records
from .request import TextSettings
from .texts import Text, given_texts, own_texts

_HELD_OUT_EVERY = 16  # of the data's sources, where no files to judge by are named


@dataclass(frozen=True)
class Chosen:
    """The documents of a run.

    Attributes:
        train: To learn from.
        judged: To judge weights by while they are trained; of other sources.
        reported: To measure the result on: what has chosen the best weights would
            flatter them.
    """

    train: list[Document]
    judged: list[Document]
    reported: list[Document]

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
    turns = itertools.cycle(held)
    for document in data:
        is_kept = held_out is None and is_held_out(
            document.source, every=_HELD_OUT_EVERY
        )
        (next(turns) if is_kept else train).add(document)
    for document in held_out or ():
        next(turns).add(document)
    judged, reported = (sample.chosen for sample in held)
    chosen = Chosen(train.chosen, judged, reported or judged)
    for what, documents in (("train on", chosen.train), ("judge by", judged)):
        if not documents:
            raise DataError(
                f"the data must have texts to {what}: got none. Add more data, of "
                f"{_HELD_OUT_EVERY} records or more, or name --held-out files."
            )
    return chosen


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


def record_all(
    pair: Pair,
    documents: Sequence[Document],
    records: Records,
    *,
    prefix: str,
    params: SamplingParams,
    settings: TextSettings,
    on_progress: Callable[[int], None],
) -> list[str]:
    """Make a record of every document whose continuation has something to foretell.

    Args:
        pair: The target.
        documents: The documents.
        records: Where they go; those that are there already are left as they are.
        prefix: Of the records' names.
        params: How tokens are drawn.
        settings: How texts are made.
        on_progress: Called with the number of documents done.

    Returns:
        The names of the records.
    """
    recorder = Recorder(Target(pair.target), params, step_size=settings.step_size)
    found = []
    for start in range(0, len(documents), settings.num_rows):
        group = documents[start : start + settings.num_rows]
        names = [f"{prefix}-{start + i:06d}" for i in range(len(group))]
        if not all(name in records for name in names):
            seeded = replace(params, seed=(params.seed or 0) + start)
            texts = _texts(pair, group, seeded, settings)
            for name, text in zip(names, texts, strict=True):
                # The first token behind a prompt is no draft's.
                if len(text.tokens) - text.num_prompt_tokens >= 2:
                    records.write(name, recorder.record(text))
        found += [name for name in names if name in records]
        on_progress(start + len(group))
    return found


def _texts(
    pair: Pair,
    group: Sequence[Document],
    params: SamplingParams,
    settings: TextSettings,
) -> list[Text]:
    if not settings.generate:
        return list(given_texts(group))
    return own_texts(pair, group, params, max_tokens=settings.max_tokens)
