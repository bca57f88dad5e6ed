"""Chooses how each round of a batch drafts, of what its rounds and its rows allow.

Of several machines one chooses, for the next round but one: see control.py. Knows
nothing of what is in flight but its numbers of drafts.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..constants import DRAFTER
from ..drafting.policy import DraftPolicy, Way, ways
from .batch import Batch
from .control import Control
from .rounds import Rounds
from .route import Route
from .sources import looking_up, round_source, sources_of


@dataclass(frozen=True)
class Chosen:
    """What the next round is.

    Attributes:
        way: How it drafts.
        policy: Who has chosen that.
        context: Tokens of the longest sequence.
        is_traced: Whether a round like it was traced before.
        word: See control.py; None on one machine.
    """

    way: Way
    policy: DraftPolicy
    context: int
    is_traced: bool
    word: mx.array | None


class WayChooser:
    """Chooses for the rounds of one batch.

    Args:
        rounds: The target and its drafter.
        batch: Who sits where.
        policy: Chooses the number of drafts.
        route: Which numbers of drafts there may be.
        control: What all machines agree on.
    """

    def __init__(
        self,
        rounds: Rounds,
        batch: Batch,
        *,
        policy: DraftPolicy,
        route: Route,
        control: Control,
    ) -> None:
        self._rounds = rounds
        self._batch = batch
        self._policy = policy
        self._route = route
        self._control = control
        self._untraced = _Untraced(rounds, route)

    def choose(self, in_flight: Sequence[int]) -> Chosen:
        """How the next round drafts.

        Args:
            in_flight: Drafts of each round in flight.
        """
        batch = self._batch
        context = max(s.offset for s in batch.live)
        policy = self._policy.for_batch(len(batch), rule=batch.rules, context=context)
        sources = sources_of(
            batch.live,
            has_drafter=self._rounds.drafter is not None,
            has_text=batch.has_text,
        )
        self._untraced.look(batch, sources)
        allowed = self._allowed
        own = self._way(policy, allowed, sources, context, in_flight)
        way = self._control.agreed(own, allowed)
        word = self._control.word(own, *way[:1], len(batch), batch.num_slots)
        is_traced = way not in self._untraced.ways
        return Chosen(way, policy, context, is_traced, word)

    def note_traced(self, way: Way) -> None:
        """A round of a way was traced."""
        self._untraced.ways.discard(way)

    @property
    def _allowed(self) -> list[int]:
        """The numbers of drafts that the next round may have."""
        batch = self._batch
        allowed = batch.capacity.allowed(self._route.allowed, batch.num_slots)
        most = max(s.request.max_draft_tokens for s in batch.live)
        return [k for k in allowed if k <= most]

    def _way(
        self,
        policy: DraftPolicy,
        allowed: Sequence[int],
        sources: Sequence[str],
        context: int,
        in_flight: Sequence[int],
    ) -> Way:
        """What this machine would choose."""
        batch = self._batch
        left = [s.num_left for s in batch.live]
        limits = [n - len(in_flight) for n in left if n is not None]
        # Drafts beside a plain round say something where their places are known.
        can_shadow = max(allowed) > 0 and not any(in_flight) and DRAFTER in sources
        can_shadow &= self._control.is_alone and not batch.settings.graph.has_host
        return policy.choose(
            allowed,
            sources=sources,
            matches=[s.match_length for s in batch.live],
            not_ready=self._untraced.ways,
            tokens_left=max(limits) if len(limits) == len(left) else None,
            tokens_to_growth=batch.capacity.room(batch.num_slots),
            can_shadow=can_shadow,
            context=context,
        )


class _Untraced:
    """Which ways of drafting have rounds that were not traced before.

    Args:
        rounds: Knows.
        route: Which numbers of drafts there may be.

    Attributes:
        ways: These ways, for the batch last looked at.
    """

    def __init__(self, rounds: Rounds, route: Route) -> None:
        self.ways: set[Way] = set()
        self._rounds = rounds
        self._route = route
        self._key: Hashable = None

    def look(self, batch: Batch, sources: Sequence[str]) -> None:
        """Ask about the rounds of a batch as it is now.

        Args:
            batch: The batch.
            sources: Where its drafts may come from.
        """
        graph, num_slots = batch.settings.graph, batch.num_slots
        thread = threading.get_ident()  # every thread has traces of its own
        rows = looking_up(batch.sequences) if batch.has_text else ()
        text_size = 0 if batch.state is None else batch.state.text_size
        key = (graph, num_slots, text_size, len(batch), thread, sources, any(rows))
        if self._key == key:
            return
        self._key = key
        self.ways = {
            way
            for way in ways(self._route.allowed, sources)
            if not self._rounds.is_ready(
                graph,
                num_draft_tokens=way.num_draft_tokens,
                source=round_source(way.source, rows),
                min_rows=self._route.min_rows,
                num_rows=len(batch),
                capacity=num_slots,
                text_size=text_size,
            )
        }
