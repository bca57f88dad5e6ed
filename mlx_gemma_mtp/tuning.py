"""What a pair has learnt on this machine: costs, acceptance, exactness.

It is kept across requests, and in the user's cache folder across processes. This file
knows nothing of how rounds are run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from .control import AcceptanceModel, CostModel, DraftLengthController, Prior
from .route import Verdict
from .store import Store

_Model = TypeVar("_Model")

# Where plain decoding won, drafting is tried again for every so many requests.
_PLAIN_REQUESTS = 8


class Tuning:
    """What is known of one pair on this machine.

    Args:
        store: Where it is kept.
        prior: What to expect of a batch of so many rows before anything was measured.

    Attributes:
        setups: What it took to trace the last rounds, seconds.
    """

    def __init__(self, store: Store, prior: Callable[[int], Prior]) -> None:
        self._store = store
        self._prior = prior
        self._kept = store.read()
        self._acceptance: dict[str, AcceptanceModel] = {}
        self._controllers: dict[tuple[str, int, int], DraftLengthController] = {}
        self._verdicts: dict[int, Verdict] = {}
        self.setups: deque[float] = deque(maxlen=5)
        self._num_plain: dict[tuple[str, int], int] = {}

    def controller(
        self, rule: str, *, num_rows: int, min_rows: int
    ) -> DraftLengthController:
        """The controller of requests of a kind; the same object for all of them.

        Args:
            rule: The rule that judges the drafts: acceptance is learnt for each.
            num_rows: Rows of the batch: costs are learnt for each number.
            min_rows: Rows that a round verifies at least.
        """
        key = (rule, num_rows, min_rows)
        if key not in self._controllers:
            prior = self._prior(num_rows)
            if rule not in self._acceptance:
                kept = self._section("acceptance").get(rule)
                self._acceptance[rule] = _restored(
                    AcceptanceModel.from_dict, kept
                ) or AcceptanceModel(prior.acceptance)
            kept = self._section("costs").get(_name(key))
            self._controllers[key] = DraftLengthController(
                prior,
                acceptance=self._acceptance[rule],
                costs=_restored(CostModel.from_dict, kept)
                or CostModel(prior.relative_cost),
            )
        return self._controllers[key]

    def verdict(self, num_rows: int) -> Verdict | None:
        """What the probe found for a number of rows; None where it has not run."""
        if num_rows not in self._verdicts:
            found = self._section("verdicts").get(str(num_rows))
            try:
                self._verdicts[num_rows] = Verdict.from_dict(found or {})
            except ValueError:
                return None
        return self._verdicts[num_rows]

    def keep_verdict(self, num_rows: int, verdict: Verdict) -> None:
        """Keep what the probe found."""
        self._verdicts[num_rows] = verdict
        self.save()

    def is_plain_turn(self, rule: str, *, num_rows: int, min_rows: int) -> bool:
        """Whether a request of a kind should rather be decoded plainly.

        So it is where plain rounds, even filled up to ``min_rows``, are expected to be
        the fastest; drafting is tried again every now and then.
        """
        controller = self.controller(rule, num_rows=num_rows, min_rows=min_rows)
        plain, best = controller.best_rate((0,)), controller.best_rate(range(9))
        if plain is None or best is None or best > plain:
            return False
        count = self._num_plain[rule, num_rows] = (
            self._num_plain.get((rule, num_rows), 0) + 1
        )
        return count % _PLAIN_REQUESTS != 0

    def save(self) -> None:
        """Write everything to the store."""
        kept = {name: dict(self._section(name)) for name in ("acceptance", "costs")}
        for rule, acceptance in self._acceptance.items():
            kept["acceptance"][rule] = acceptance.to_dict()
        for key, controller in self._controllers.items():
            kept["costs"][_name(key)] = controller.costs.to_dict()
        kept["verdicts"] = dict(self._section("verdicts"))
        for num_rows, verdict in self._verdicts.items():
            kept["verdicts"][str(num_rows)] = verdict.to_dict()
        self._kept = kept
        self._store.write(kept)

    def _section(self, name: str) -> dict[str, Any]:
        section = self._kept.get(name)
        return section if isinstance(section, dict) else {}


def _restored(from_dict: Callable[[Any], _Model], kept: object) -> _Model | None:
    """A model as it was kept; None where it was not, or is nonsense."""
    if kept is None:
        return None
    try:
        return from_dict(kept)
    except ValueError:
        return None


def _name(key: tuple[str, int, int]) -> str:
    rule, num_rows, min_rows = key
    return f"{rule}, {num_rows} rows, {min_rows} at least"
