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
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from threading import Event, Lock

import mlx.core as mx

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
    seen = {tuple(document.prompt) for sample in held for document in sample.chosen}
    judged, reported = (sample.chosen for sample in held)
    # What is judged by must not have been learnt, also where the data repeats itself.
    learnt = [text for text in train.chosen if tuple(text.prompt) not in seen]
    chosen = Chosen(learnt, judged, reported or judged)
    for what, documents in (("learn from", learnt), ("judge by", judged)):
        if not documents:
            raise DataError(
                f"the data must have texts to {what}: got none, or none that are not "
                f"held out too. Add more data, of {_HELD_OUT_EVERY} records or more, "
                "or name other --held-out files."
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


@dataclass
class Writing:
    """Makes a record of every document whose continuation has something to foretell.

    Attributes:
        pair: The target.
        documents: The documents.
        records: Where records go; those that are there already are left as they are.
        prefix: Of the records' names.
        params: How tokens are drawn.
        settings: How texts are made.
        on_progress: Called with the number of documents done.
    """

    pair: Pair
    documents: Sequence[Document]
    records: Records
    prefix: str
    params: SamplingParams
    settings: TextSettings
    on_progress: Callable[[int], None]

    def __post_init__(self) -> None:
        """Nothing is done yet."""
        self._num_done = 0
        self._lock = Lock()
        self._is_stopped = Event()

    def run(self) -> list[str]:
        """Make all records; gives their names."""
        starts = range(0, len(self.documents), self.settings.num_rows)
        with self.pair.wired():
            self._write(starts)
        names = map(self._name, range(len(self.documents)))
        return [name for name in names if name in self.records]

    def _write(self, starts: range) -> None:
        count = min(self.settings.num_threads, len(starts))
        if count <= 1:
            self._write_all(starts)
        else:
            self._write_in_threads([starts[i::count] for i in range(count)])

    def _write_in_threads(self, shares: Sequence[range]) -> None:
        """Each thread has a stream of its own, which on a CPU is a core of its own."""
        with ThreadPoolExecutor(len(shares)) as pool:
            futures = [pool.submit(self._write_in_thread, share) for share in shares]
            try:
                for future in as_completed(futures):
                    future.result()
            finally:
                self._is_stopped.set()

    def _write_in_thread(self, starts: range) -> None:
        try:
            self._write_all(starts)
        finally:
            mx.clear_streams()  # a thread that leaves some aborts the process at exit

    def _write_all(self, starts: range) -> None:
        """Make records of the groups that begin at these documents."""
        settings = self.settings
        recorder = Recorder(
            Target(self.pair.target), self.params, step_size=settings.step_size
        )
        for start in starts:
            if self._is_stopped.is_set():
                return
            group = self.documents[start : start + settings.num_rows]
            names = [self._name(start + i) for i in range(len(group))]
            if not all(map(self.records.is_done, names)):
                for name, text in zip(names, self._texts(group, start), strict=True):
                    # The first token behind a prompt is no draft's.
                    if len(text.tokens) - text.num_prompt_tokens < 2:
                        self.records.skip(name)
                    else:
                        self.records.write(name, recorder.record(text))
            with self._lock:
                self._num_done += len(group)
                self.on_progress(self._num_done)

    def _texts(self, group: Sequence[Document], start: int) -> list[Text]:
        """The texts of a group; each document has a seed of its own."""
        if not self.settings.generate:
            return list(given_texts(group))
        seed = (self.params.seed or 0) + start
        return own_texts(
            self.pair,
            group,
            replace(self.params, seed=seed),
            max_tokens=self.settings.max_tokens,
            step_size=self.settings.step_size,
        )

    def _name(self, index: int) -> str:
        return f"{self.prefix}-{index:06d}"
