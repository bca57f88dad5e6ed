"""What a pair has learnt on this machine: costs, acceptance, exactness.

It is kept across requests, and in the user's cache folder across processes. Several
threads may decode with one pair. This file knows nothing of how rounds are run.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from ..constants import DRAFTER, LOOKUP
from ..drafting.acceptance_model import AcceptanceModel
from ..drafting.controller import DraftLengthController
from ..drafting.prior import Prior
from ..drafting.saved_numbers import numbers
from ..engine.early_start import EarlyStart
from ..engine.route import Route
from ..engine.stats import RoundStats
from ..exactness.compared import Compared
from ..exactness.verdict import Verdict
from ..store import Store

# Where plain decoding won, drafting is tried again: by the second and the fourth
# process, as what made it win may have been a busy machine, then by every so many.
_PLAIN_PROCESSES = 8
_NUM_SETUPS = 5
_SECTIONS = ("controllers", "verdicts", "probes", "plain", "setups")
_MOST = 1e6  # of any kept number; more is damage


class Calibration:
    """What is known of one pair on this machine.

    Args:
        store: Where it is kept.
        prior: What to expect of so many rows of so many tokens before anything was
            measured.

    Attributes:
        setups: What it took to trace the last rounds, seconds.
        lock: Held while something is learnt or asked for.
        probing: Held while a probe runs: another thread's goes on behind it.
    """

    def __init__(self, store: Store, prior: Callable[[int, int], Prior]) -> None:
        self.setups: deque[float] = deque(maxlen=_NUM_SETUPS)
        self.lock = threading.RLock()
        self.probing = threading.Lock()
        self._store = store
        self._prior = prior
        self._kept = _sections(store.read())
        self._acceptance: dict[str, AcceptanceModel] = {}
        self._lookups: dict[str, list[AcceptanceModel]] = {}
        self._controllers: dict[tuple[str, int, int], DraftLengthController] = {}
        self._verdicts: dict[int, Verdict] = {}
        self._compared: dict[int, Compared] = {}
        self._early_starts: dict[int, EarlyStart] = {}
        self._given_up: set[int] = set()
        self._num_plain: dict[str, int] = {}  # processes in a row, by kind of request
        self._is_unfilled: dict[str, bool] = {}  # what this process has decided
        self._restore_counts()

    def controller(
        self, rule: str, *, num_rows: int, min_rows: int, context: int = 0
    ) -> DraftLengthController:
        """The controller of requests of a kind; the same object for all of them.

        Args:
            rule: The rule that judges the drafts: acceptance is learnt for each.
            num_rows: Rows of the batch: costs are learnt for each number.
            min_rows: Rows that a round verifies at least.
            context: Tokens of the longest row, for what to expect at first.
        """
        key = (rule, num_rows, min_rows)
        with self.lock:
            if key not in self._controllers:
                prior = self._prior(num_rows, context)
                controller = self._restored(key)
                if controller is None:
                    controller = DraftLengthController(prior)
                else:
                    controller.resume(prior)
                # One model of the text for all costs.
                controller.acceptance = self._acceptance.setdefault(
                    rule, controller.acceptance
                )
                controller.lookup.acceptance = self._lookups.setdefault(
                    rule, controller.lookup.acceptance
                )
                self._controllers[key] = controller
            return self._controllers[key]

    def times_plain(self, stats: RoundStats, *, min_rows: int = 1) -> float | None:
        """How many times as fast as plain rounds the rounds of one row were.

        By what rounds of each number of drafts take undisturbed: tracing is no part of
        it.

        Args:
            stats: What the rounds did.
            min_rows: Rows that their target read at least.

        Returns:
            None where plain rounds, or some of these, were never measured.
        """
        counts, num_tokens = stats.num_draft_tokens, stats.rounds + stats.accepted
        if not stats.engaged:
            return None
        with self.lock:
            controller = self._controllers.get((stats.rule, 1, min_rows))
            if controller is None:
                return None
            costs, lookup_costs = controller.costs, controller.lookup.costs
            looked_up = +stats.looked_up
            drafted = counts - looked_up
            if not (
                all(map(costs.has_measured, {0, *drafted}))
                and all(map(lookup_costs.has_measured, looked_up))
            ):
                return None
            plain_s = costs.seconds(0) / self._fill_cost(min_rows)
            took_s = sum(n * costs.seconds(k) for k, n in drafted.items())
            # No less than plain ones, which were measured in another hour perhaps.
            took_s += sum(
                n * max(lookup_costs.seconds(k), costs.seconds(0))
                for k, n in looked_up.items()
            )
            return num_tokens * plain_s / took_s

    def _fill_cost(self, min_rows: int) -> float:
        """How much longer plain rounds take that are filled up."""
        verdict = self.verdict(1)
        return verdict.fill_cost if verdict is not None and min_rows > 1 else 1.0

    def early_start(self, num_rows: int) -> EarlyStart:
        """What decides when rounds of so many rows are started, in this process."""
        with self.lock:
            return self._early_starts.setdefault(num_rows, EarlyStart())

    def verdict(self, num_rows: int) -> Verdict | None:
        """What the probe found for a number of rows; None where it has not."""
        with self.lock:
            if num_rows not in self._verdicts:
                found = self._kept["verdicts"].get(str(num_rows))
                try:
                    self._verdicts[num_rows] = Verdict.from_dict(found)
                except ValueError:
                    return None
            return self._verdicts[num_rows]

    def keep_verdict(self, num_rows: int, verdict: Verdict) -> None:
        """Keep what the probe found."""
        with self.lock:
            self._verdicts[num_rows] = verdict
            self._compared.pop(num_rows, None)
            self.save()

    def compared(self, num_rows: int) -> Compared:
        """What probes for a number of rows have compared so far; theirs to add to."""
        with self.lock:
            if num_rows not in self._compared:
                found = self._kept["probes"].get(str(num_rows))
                try:
                    self._compared[num_rows] = Compared.from_dict(found)
                except ValueError:
                    self._compared[num_rows] = Compared()
            return self._compared[num_rows]

    def give_up_probe(self, num_rows: int) -> None:
        """Remember, for this process, that a probe would take too long."""
        self._given_up.add(num_rows)

    def has_given_up_probe(self, num_rows: int) -> bool:
        """Whether a probe would take too long."""
        return num_rows in self._given_up

    def prefers_unfilled(
        self,
        rule: str,
        *,
        num_rows: int,
        filled: Route,
        unfilled: Route,
        sources: Collection[str] = (DRAFTER,),
    ) -> bool:
        """Whether requests had rather take the route whose plain rounds are short.

        So it is where that route, whose fewer drafts are outweighed by shorter plain
        rounds, is expected to be the faster. It is decided by what earlier processes
        have learnt, once for each kind of request, so that this one's texts are alike;
        now and then a process tries the other route again.

        Args:
            rule: The rule that judges their drafts.
            num_rows: Of their batch.
            filled: The route whose plain rounds are filled up.
            unfilled: The other one.
            sources: Where drafts may come from.
        """
        looked = ", looked up" * (LOOKUP in sources) + " alone" * (sources == (LOOKUP,))
        name = f"{rule}, {num_rows} rows{looked}"
        with self.lock:
            if name not in self._is_unfilled:
                controller = self.controller(
                    rule, num_rows=num_rows, min_rows=filled.min_rows
                )
                rate = partial(controller.best_rate, sources=sources)
                is_faster = self._is_faster(unfilled, filled, num_rows, rate)
                count = self._num_plain.get(name, 0) + 1 if is_faster else 0
                is_retry = count in (2, 4) or count % _PLAIN_PROCESSES == 0
                self._num_plain[name] = count
                self._is_unfilled[name] = is_faster and not is_retry
            return self._is_unfilled[name]

    def _is_faster(
        self,
        unfilled: Route,
        filled: Route,
        num_rows: int,
        rate: Callable[[Collection[int]], float | None],
    ) -> bool:
        """Whether short plain rounds are expected to outweigh fewer drafts."""
        verdict = self.verdict(num_rows)
        best, plain = rate(filled.allowed), rate((0,))
        if verdict is None or best is None or plain is None:
            return False
        other = plain * verdict.fill_cost
        drafts = [k for k in unfilled.allowed if k]
        if drafts:
            other = max(other, rate(drafts) or 0.0)
        return best <= other

    def save(self) -> None:
        """Write what this process knows to the store, beside what others do."""
        with self.lock, self._store.locked():
            kept = _sections(self._store.read())
            for key, controller in self._controllers.items():
                kept["controllers"][_name(key)] = controller.to_dict()
            for num_rows, verdict in self._verdicts.items():
                kept["verdicts"][str(num_rows)] = verdict.to_dict()
                kept["probes"].pop(str(num_rows), None)
            for num_rows, compared in self._compared.items():
                kept["probes"][str(num_rows)] = compared.to_dict()
            kept["plain"].update(self._num_plain)
            kept["setups"] = {str(i): s for i, s in enumerate(self.setups)}
            self._kept = kept
            self._store.write(kept)

    def _restore_counts(self) -> None:
        """Take up what was counted and timed, as far as it makes sense."""
        for name in self._kept["plain"]:
            with contextlib.suppress(ValueError):
                (count,) = numbers(self._kept["plain"], name, 1, low=0, high=_MOST)
                self._num_plain[name] = int(count)
        for i in range(_NUM_SETUPS):
            with contextlib.suppress(ValueError):
                self.setups += numbers(
                    self._kept["setups"], str(i), 1, low=0, high=_MOST
                )

    def _restored(self, key: tuple[str, int, int]) -> DraftLengthController | None:
        """A controller as it was kept; None where it was not, or is nonsense."""
        kept = self._kept["controllers"].get(_name(key))
        try:
            return DraftLengthController.from_dict(kept)
        except ValueError:
            return None


def _sections(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parts of what the store has; empty ones for what is missing or nonsense."""
    sections = {name: found.get(name) for name in _SECTIONS}
    return {
        name: dict(section) if isinstance(section, dict) else {}
        for name, section in sections.items()
    }


def _name(key: tuple[str, int, int]) -> str:
    rule, num_rows, min_rows = key
    return f"{rule}, {num_rows} rows, {min_rows} at least"
