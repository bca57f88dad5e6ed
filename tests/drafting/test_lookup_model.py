"""What drafts from the text are worth, alone and on simulated machines and texts.

Run: python -m pytest tests/drafting/test_lookup_model.py
     python -m pytest -m control tests/drafting/test_lookup_model.py  # every cell
"""

from __future__ import annotations

import math
import sys

import pytest

from mlx_gemma_mtp.drafting.controller import DraftLengthController
from mlx_gemma_mtp.drafting.cost_model import TYPICAL_COST, CostModel
from mlx_gemma_mtp.drafting.lookup_model import (
    LookupModel,
    kind_of,
    verify_cost,
)
from mlx_gemma_mtp.drafting.prior import DEFAULT_PRIOR
from tests.drafting.lookup_simulator import ALL_KINDS, RepeatingMachine, gain
from tests.drafting.simulator import saved_and_loaded


def test_longer_matches_are_of_later_kinds():
    kinds = [kind_of(length) for length in (0, 2, 3, 4, 5, 8, 9, 15, 16)]
    assert kinds == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_costs_without_a_drafter_are_smaller():
    costs = verify_cost(TYPICAL_COST)
    assert costs[0] == 1
    assert all(1 < c < t for c, t in zip(costs[1:], TYPICAL_COST[1:], strict=True))


class TestModel:
    def model(self):
        return LookupModel(verify_cost(TYPICAL_COST))

    def test_what_was_seen_of_a_kind_counts_for_it_alone(self):
        model = self.model()
        before = model.expected_tokens([0])
        for _ in range(50):
            model.observe(20, 8)
        assert model.expected_tokens([16])[8] > 8.3
        assert model.expected_tokens([0]) == before
        for _ in range(50):
            model.observe(0, 0)
        assert model.expected_tokens([0])[8] < 1.1

    def test_rows_are_averaged(self):
        model = self.model()
        one, other = model.expected_tokens([20]), model.expected_tokens([0])
        assert model.expected_tokens([20, 0]) == pytest.approx(
            [(a + b) / 2 for a, b in zip(one, other, strict=True)]
        )

    def test_the_drafter_is_judged_by_rounds_of_long_matches(self):
        model = self.model()
        assert model.drafted_tokens([0], 4, 2.5) == 2.5
        for _ in range(50):
            model.observe_drafted(0, 4, 0)
            model.observe_drafted(30, 4, 4)
        assert model.drafted_tokens([30], 4, 2.5) > 4.7
        halfway = (model.drafted_tokens([30], 4, 2.5) + 2.5) / 2
        assert model.drafted_tokens([30, 0], 4, 2.5) == pytest.approx(halfway)

    def test_seconds_before_any_round_are_a_share_of_the_drafters(self):
        model, drafting = self.model(), CostModel(TYPICAL_COST)
        for k, seconds in ((0, 0.03), (4, 0.09), (8, 0.2)):
            for _ in range(20):
                drafting.observe(k, seconds)
        found, with_drafter = model.all_seconds(drafting), drafting.all_seconds()
        for k in range(9):
            share = verify_cost(TYPICAL_COST)[k] / TYPICAL_COST[k]
            assert found[k] == pytest.approx(with_drafter[k] * share)

    def test_measured_seconds_are_believed_up_to_those_with_a_drafter(self):
        model, drafting = self.model(), CostModel(TYPICAL_COST)
        for _ in range(30):
            drafting.observe(8, 0.1)
            model.costs.observe(8, 0.07)
            model.costs.observe(4, 9.0)
        assert model.all_seconds(drafting)[8] == pytest.approx(0.07, rel=0.2)
        drafting.observe(4, 0.06)
        assert model.all_seconds(drafting)[4] <= drafting.seconds(4)

    def test_without_a_drafter_its_own_rounds_tell(self):
        model, plain = self.model(), CostModel(TYPICAL_COST)
        for _ in range(30):
            plain.observe(0, 0.03)
            model.costs.observe(0, 0.03)
            model.costs.observe(8, 0.24)
        assert model.all_seconds(plain)[8] == pytest.approx(0.24, rel=0.1)

    def test_the_rate_is_that_of_the_best_round_for_every_match(self):
        model, plain = self.model(), CostModel(TYPICAL_COST)
        for _ in range(2000):
            model.observe(0, 0)
            model.observe(16, 8)
        for _ in range(50):
            plain.observe(0, 0.02)
            model.costs.observe(0, 0.02)
            model.costs.observe(8, 0.04)
        assert model.best_rate([0], [(1.0, 0.02)], plain) == pytest.approx(50)
        # Every other round 9 tokens in 40 ms, else one in 20 ms.
        found = model.best_rate([0, 8], [(1.0, 0.02)], plain)
        assert found == pytest.approx(10 / 0.06, rel=0.05)

    def test_saved_and_loaded(self):
        model = self.model()
        model.observe(20, 5)
        model.observe_drafted(20, 4, 2)
        model.costs.observe(8, 0.1)
        assert LookupModel.from_dict(model.to_dict()).to_dict() == model.to_dict()

    @pytest.mark.parametrize("damage", [None, [], {}, {"acceptance": [{}] * 4}])
    def test_nonsense(self, damage):
        with pytest.raises(ValueError, match="must be"):
            LookupModel.from_dict(damage)


class TestController:
    def trained(self, kind="re-emission", curve="m5", **options):
        machine = RepeatingMachine(curve, **options)
        machine.run(kind, 400, 1)
        return machine

    def test_text_that_repeats_itself_drafts_itself(self):
        machine = self.trained()
        assert machine.num_rounds[True] > 30  # for more than half of the tokens
        assert machine.controller.choose_lookup([20]) in (4, 8)
        assert machine.controller.choose_lookup([0]) == 0
        # Of many rows one that repeats itself is not enough.
        assert machine.controller.choose_lookup([20, *[0] * 7]) == 0

    def test_new_text_does_not(self):
        machine = self.trained("new", tracing=5)
        assert machine.num_rounds[True] == 0

    @pytest.mark.parametrize("num_draft_tokens", [1, 3, 5, 6, 7])
    def test_a_number_that_is_fixed_is_drafted_from_the_text(self, num_draft_tokens):
        controller, allowed = self.trained().controller, [num_draft_tokens]
        found = controller.choose_lookup([20], allowed=allowed, drafter_allowed=[0])
        assert found == num_draft_tokens

    def test_last_tokens(self):
        """Drafts beyond the end are worth nothing."""
        controller = self.trained().controller
        assert controller.choose_lookup([20], tokens_left=1) == 0

    def test_what_is_allowed(self):
        controller = self.trained(has_drafter=False).controller
        few = controller.choose_lookup([20], allowed=[0, 2, 3], drafter_allowed=[0])
        assert few == 2
        assert controller.choose_lookup([20], allowed=[0]) == 0

    def asked_to_trace(self, controller, *, price_s, **options):
        """How many rounds pass until one is traced for drafts from the text."""
        controller.lookup.start()
        for _ in range(20):
            controller.lookup.observe(20, 8)
        setup_s = dict.fromkeys(range(1, 9), price_s)
        for i in range(200):
            if controller.choose_lookup([20], setup_s=setup_s, **options):
                return i
        return None

    @pytest.mark.parametrize("price_s", [0.1, 0.2, 0.4])
    def test_tracing_is_paid_for_by_what_was_missed(self, price_s):
        """A round misses what its own tokens would have taken less, no more."""
        controller = self.trained(has_lookup=False).controller
        found = self.asked_to_trace(controller, price_s=price_s)
        seconds = controller.costs.all_seconds()
        tokens = controller.acceptance.expected_tokens()
        best = min(range(9), key=lambda k: seconds[k] / tokens[k])
        drafted = controller.lookup.drafted_tokens([20], best, tokens[best])
        lookup_s = controller.lookup.all_seconds(controller.costs)
        looked_up = controller.lookup.expected_tokens([20])
        per_token_s = min(lookup_s[k] / looked_up[k] for k in (2, 4, 8))
        missed_s = seconds[best] - drafted * per_token_s
        assert found == math.ceil(price_s / missed_s) - 1

    @pytest.mark.parametrize("few", [{"tokens_left": 3}, {"tokens_to_growth": 3}])
    def test_nothing_is_traced_for_few_tokens(self, few):
        controller = self.trained(has_lookup=False).controller
        assert self.asked_to_trace(controller, price_s=0.15, **few) is None
        assert self.asked_to_trace(controller, price_s=0.15) == 0  # it is missed long

    def test_times_that_nobody_has_measured_miss_nothing(self):
        """Such as those of another number of rows, of a text that is known."""
        known = self.trained().controller
        controller = DraftLengthController(acceptance=known.acceptance)
        controller.lookup.acceptance = known.lookup.acceptance
        setup_s = dict.fromkeys(range(9), 0.2)
        options = {"tokens_left": 100, "drafter_setup_s": setup_s}
        assert self.asked_to_trace(controller, price_s=0.2, **options) is None

    def test_what_rounds_from_the_text_save_pays_for_the_next_trace(self):
        """Of two controllers that have traced once, one has used it."""
        found = []
        for num_used in (0, 50):
            controller = self.trained(has_lookup=False).controller
            assert self.asked_to_trace(controller, price_s=0.1) is not None
            for _ in range(num_used):
                assert controller.choose_lookup([20])
            found.append(self.asked_to_trace(controller, price_s=0.1))
        assert found[0] > 2 * found[1]

    @pytest.mark.parametrize(("share", "is_traced"), [(0.95, False), (0.85, True)])
    def test_a_small_gain_is_not_traced_for(self, monkeypatch, share, is_traced):
        """What is a few percent may be the models' mistake."""
        controller = self.trained(has_lookup=False).controller
        lookup = controller.lookup
        self.asked_to_trace(controller, price_s=1e3)
        seconds = controller.costs.all_seconds()
        tokens = controller.acceptance.expected_tokens()
        best = min(range(9), key=lambda k: seconds[k] / tokens[k])
        per_token_s = seconds[best] / lookup.drafted_tokens([20], best, tokens[best])
        looked_up = lookup.expected_tokens([20])
        lookup_s = [per_token_s * share * looked_up[8]] * 9
        monkeypatch.setattr(lookup, "all_seconds", lambda _: lookup_s)
        found = self.asked_to_trace(controller, price_s=0.1)
        assert (found is not None) == is_traced

    def test_short_texts_together_pay_for_tracing(self):
        """None of them is long enough to, and rounds drafted so are no loss."""
        machine = RepeatingMachine("m5", tracing=10)
        for seed in range(20):
            machine.run("edit", 64, seed)
        assert machine.num_rounds[True] > 20

    @pytest.mark.parametrize("kind", ["edit", "re-emission"])
    def test_traces_that_each_text_needs_anew_are_no_great_loss(self, kind):
        times = {}
        for has_lookup in (False, True):
            machine = RepeatingMachine(
                "m5", tracing=20, has_lookup=has_lookup, loses_traces=True
            )
            times[has_lookup] = sum(machine.run(kind, 200, s) for s in range(24))
        assert times[False] / times[True] > 0.97

    def test_plain_rounds_are_measured_first(self):
        controller = DraftLengthController()
        assert controller.choose_lookup([20]) == 0
        assert controller.choose() == 0

    def test_without_a_drafter(self):
        machine = self.trained(has_drafter=False)
        assert machine.num_rounds[True] > 20
        assert machine.controller.choose_lookup([20], drafter_allowed=[0]) in (4, 8)

    def test_files(self):
        """Those of controllers that never looked anything up are as they were."""
        plain = DraftLengthController()
        plain.observe(4, [2], 0.1)
        assert "lookup" not in plain.to_dict()
        controller = self.trained().controller
        other = saved_and_loaded(controller)
        assert other.to_dict() == controller.to_dict()
        other.resume(DEFAULT_PRIOR)
        assert other.choose_lookup([20]) in (4, 8)
        without = controller.to_dict()
        del without["lookup"]  # as older versions have written it
        old = DraftLengthController.from_dict(without)
        assert "lookup" not in old.to_dict()

    def test_rounds_without_a_time_teach_nothing_of_it(self):
        controller = self.trained().controller
        before = controller.lookup.costs.to_dict()
        for seconds in (None, math.inf, math.nan):
            controller.observe_lookup(8, seconds)
        assert controller.lookup.costs.to_dict() == before


# Least and most times as fast as with the drafter alone, in a process that has emitted
# a text of the kind before. Measured: see docs/drafts-and-exactness.md.
CELLS = {
    ("m5", "new"): 0.99,
    ("m5", "prose"): 0.99,
    ("m5", "re-emission"): 1.25,
    ("m3", "re-emission"): 1.15,
    ("m1", "edit"): 1.2,
    ("m3", "edit"): 1.4,
    ("m5", "well drafted edit"): 1.2,
    ("mixture", "rewrite"): 1.25,
    ("mixture", "well drafted"): 1.15,
}


@pytest.mark.parametrize(("curve", "kind"), CELLS)
def test_throughput(curve, kind):
    assert gain(curve, kind, tracing=5, num_seeds=5) >= CELLS[curve, kind]


@pytest.mark.control
def test_throughput_everywhere(capsys):
    """Never much slower; the table is that of docs/drafts-and-exactness.md."""
    ways: tuple[dict[str, int], ...]
    ways = ({"tracing": 5, "num_before": 0}, {"tracing": 5}, {})
    found = {
        (curve, kind): [gain(curve, kind, num_seeds=16, **way) for way in ways]
        for curve in ("m1", "m3", "m5", "mixture")
        for kind in ALL_KINDS
    }
    with capsys.disabled():
        for (curve, kind), gains in found.items():
            shown = " ".join(f"{each:6.3f}" for each in gains)
            sys.stdout.write(f"{curve:8} {kind:13} {shown}\n")
    assert min(min(gains) for gains in found.values()) >= 0.95
