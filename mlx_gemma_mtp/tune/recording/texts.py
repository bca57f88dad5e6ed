"""Texts to learn from: the target's own continuations, or the data as it is.

Knows what a text is and how the target writes one; nothing of files or of training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ...engine.decoder import Decoder, Request
from ...pair.pair import Pair
from ...sampling.params import SamplingParams
from ..data.documents import Document


@dataclass(frozen=True)
class Text:
    """A sequence of tokens of which the end was written by, or is read as, the target.

    Attributes:
        tokens: Token ids.
        num_prompt_tokens: How many of them, from the first on, are the prompt: 1 or
            more. What follows is what a drafter would have to foretell.
        kind: Of text, for the report.
    """

    tokens: list[int]
    num_prompt_tokens: int
    kind: str


def given_texts(documents: Iterable[Document]) -> Iterator[Text]:
    """The data as it is."""
    for document in documents:
        tokens = [*document.prompt, *document.rest]
        yield Text(tokens, len(document.prompt), document.kind)


def own_texts(
    pair: Pair,
    documents: Sequence[Document],
    params: SamplingParams,
    *,
    max_tokens: int,
    step_size: int,
) -> list[Text]:
    """Let the target continue the documents' prompts, all together.

    A text is a function of its prompt, the settings and the target alone: the i-th has
    the seed ``params.seed + i``.

    Args:
        pair: The target; it decodes plainly.
        documents: Whose prompts.
        params: How tokens are drawn; with a seed.
        max_tokens: Most tokens of a continuation.
        step_size: Most tokens of a prompt in one forward.
    """
    requests = [
        Request(
            document.prompt,
            max_tokens,
            replace(params, seed=((params.seed or 0) + i) % 2**64),
            pair.eos_token_ids,
        )
        for i, document in enumerate(documents)
    ]
    written: list[list[int]] = [[] for _ in requests]
    decoder = Decoder(
        pair.rounds, requests, num_draft_tokens=0, prefill_step_size=step_size
    )
    for outputs in decoder.run():
        for output in outputs:
            written[output.sequence.index] += output.tokens
    return [
        Text([*document.prompt, *tokens], len(document.prompt), document.kind)
        for document, tokens in zip(documents, written, strict=True)
    ]
