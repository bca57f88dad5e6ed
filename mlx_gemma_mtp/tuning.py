"""What a pair has learnt on this machine: costs, acceptance, exactness.

It is kept across requests, and in the user's cache folder across processes. This file
knows nothing of how rounds are run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from .control import AcceptanceModel, CostModel, DraftLengthController, Prior
from .learnt import numbers
from .route import Route, Verdict
from .store import Store

_Model = TypeVar("_Model")

# Where plain decoding won, drafting is tried again for every so many requests.
_PLAIN_REQUESTS = 8
_MOST_SECONDS = 1e6  # of credit; more is damage


class Tuning:
    """What is known of one pair on this machine.

    Args:
        store: Where it is kept.
        prior: What to expect of so many rows of so many tokens before anything was
            measured.

    Attributes:
        setups: What it took to trace the last rounds, seconds.
    """

    def __init__(self, store: Store, prior: Callable[[int, int], Prior]) -> None:
        self._store = store
        self._prior = prior
        self._kept = store.read()
        self._acceptance: dict[str, AcceptanceModel] = {}
        self._controllers: dict[tuple[str, int, int], DraftLengthController] = {}
        self._verdicts: dict[int, Verdict] = {}
        self.setups: deque[float] = deque(maxlen=5)
        self._num_plain: dict[tuple[str, int], int] = {}

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
        if key not in self._controllers:
            prior = self._prior(num_rows, context)
            if rule not in self._acceptance:
                kept = self._section("acceptance").get(rule)
                self._acceptance[rule] = _restored(
                    AcceptanceModel.from_dict, kept
                ) or AcceptanceModel(prior.acceptance)
            name = _name(key)
            kept = self._section("costs").get(name)
            controller = self._controllers[key] = DraftLengthController(
                prior,
                acceptance=self._acceptance[rule],
                costs=_restored(CostModel.from_dict, kept)
                or CostModel(prior.relative_cost),
            )
            controller.credit_s = _restored(_credit, self._section("credit").get(name))
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

    def is_plain_turn(self, rule: str, *, num_rows: int, route: Route) -> bool:
        """Whether a request had rather be decoded plainly than by a filled-up route.

        So it is where plain rounds, as they are, are expected to be the fastest;
        drafting is tried again every now and then.
        """
        controller = self.controller(rule, num_rows=num_rows, min_rows=route.min_rows)
        verdict = self.verdict(num_rows)
        filled, best = controller.best_rate((0,)), controller.best_rate(route.allowed)
        if verdict is None or filled is None or best is None:
            return False
        if best > filled * verdict.fill_cost:
            return False
        count = self._num_plain[rule, num_rows] = (
            self._num_plain.get((rule, num_rows), 0) + 1
        )
        return count % _PLAIN_REQUESTS != 0

    def save(self) -> None:
        """Write everything to the store."""
        sections = ("acceptance", "costs", "credit")
        kept = {name: dict(self._section(name)) for name in sections}
        for rule, acceptance in self._acceptance.items():
            kept["acceptance"][rule] = acceptance.to_dict()
        for key, controller in self._controllers.items():
            kept["costs"][_name(key)] = controller.costs.to_dict()
            kept["credit"][_name(key)] = {"seconds": controller.credit_s}
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


def _credit(kept: object) -> float:
    """What probes may still cost.

    Raises:
        ValueError: It is no number of seconds.
    """
    (seconds,) = numbers(kept, "seconds", 1, low=-_MOST_SECONDS, high=_MOST_SECONDS)
    return seconds


def _name(key: tuple[str, int, int]) -> str:
    rule, num_rows, min_rows = key
    return f"{rule}, {num_rows} rows, {min_rows} at least"
