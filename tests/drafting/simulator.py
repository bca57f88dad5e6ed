"""Rounds of a made-up machine on a made-up text, to judge who chooses their K.

A text is, for each position, how many of unlimited drafts the target would accept
there: fixed by process and seed, so that whoever drafts meets the same luck. Time is
in plain rounds. Throughput counts a round's true time; what is observed is noisy, late
and now and then stalled.
"""

import json
import math
import random
from functools import cache, lru_cache

from mlx_gemma_mtp.drafting.controller import DraftLengthController
from mlx_gemma_mtp.drafting.prior import DEFAULT_PRIOR

DEPTH = 8
PLAIN_S = 0.03  # what a plain round takes on the observer's clock


def linear(first, slope):
    """A round of block width K + 1 costs first + slope (K + 1), a plain one 1."""
    return [1.0] + [first + slope * (k + 1) for k in range(1, DEPTH + 1)]


def grown(forward, draft):
    """A forward over 1, 2, ... rows, and a draft step per draft."""
    return [rows + draft * k for k, rows in enumerate(forward)]


def mixture():
    """Gemma 4 26B-A4B in 4 bits: 1.34 GB are dense, 0.80 GB the experts of one token.

    K + 1 rows read the union of their experts, a quarter less than if they chose
    independently; a draft step reads 0.24 GB.
    """
    union = [16 * (1 - (1 - 8 / 128) ** rows) for rows in range(1, DEPTH + 2)]
    return grown([(1.34 + 0.8 * (0.25 + 0.75 * u)) / 2.14 for u in union], 0.24 / 2.14)


# Round time over that of K = 0. Named by chip: growth of a forward with its rows as
# published for MLX 0.32, and 4 % (M5: 5 %) per draft step. Named by model and chip:
# round costs published by mlxcel.
CURVES = {
    "flat": linear(0.99, 0.01),
    "steep": linear(0.0, 1.0),
    "cpu": linear(0.85, 0.15),
    "m1": grown([1, 1.62, 2.24, 2.86, 3.48, 4.1, 4.7, 5.3, 5.9], 0.04),
    "m3": grown([1, 1.10, 1.28, 1.45, 1.75, 2.05, 2.35, 2.6, 2.9], 0.04),
    "m5": grown([1, 1.06, 1.12, 1.27, 1.42, 1.68, 1.94, 2.2, 2.5], 0.05),
    "mixture": mixture(),
    "31b-m3-ultra": linear(0.83, 0.170),
    "12b-m3-ultra": linear(1.14, 0.090),
    "12b-m1-ultra": linear(1.35, 0.346),
    "12b-m5-max": linear(1.12, 0.038),
}


def constant(rate):
    return lambda rng, length: [[rate] * DEPTH] * length


def decaying(rng, length):
    return [[0.9 * 0.85**i for i in range(DEPTH)]] * length


def drifting(first, last):
    def process(rng, length):
        return [[first + (last - first) * t / length] * DEPTH for t in range(length)]

    return process


def bimodal(rng, length):
    rate = rng.choice([0.9, 0.2])
    rates: list[list[float]] = []
    while len(rates) < length:
        rates += [[rate] * DEPTH] * rng.randint(100, 300)
        rate = 1.1 - rate
    return rates[:length]


# P(a draft is accepted | those before it were), by text position and draft.
PROCESSES = {
    **{f"{p:g}": constant(p) for p in (0, 0.1, 0.3, 0.5, 0.6, 0.75, 0.85, 0.95, 1)},
    "decaying": decaying,
    "falling": drifting(0.9, 0.2),
    "rising": drifting(0.2, 0.9),
    "bimodal": bimodal,
}


@lru_cache(maxsize=1024)
def text(process, length, seed):
    """For each position, how many of unlimited drafts would be accepted."""
    rng = random.Random(f"{process} {length} {seed}")
    runs = []
    for rates in PROCESSES[process](rng, length):
        run = 0
        while run < DEPTH and rng.random() < rates[run]:
            run += 1
        runs.append(run)
    return runs


@lru_cache(maxsize=1024)
def noise(seed, length):
    """Factors of observed times: 3 % log-normal, and 1 % stalls of 5 to 20 times."""
    rng = random.Random(f"noise {seed}")
    factors = []
    for _ in range(length):
        factor = math.exp(rng.gauss(0, 0.03))
        factors.append(factor * (rng.uniform(5, 20) if rng.random() < 0.01 else 1))
    return factors


def time_of_fixed(curve, process, length, seed, k):
    """Time that rounds of one K take for a text."""
    return CURVES[curve][k] * rounds_of_fixed(process, length, seed, k)


@cache
def rounds_of_fixed(process, length, seed, k):
    runs, position, rounds = text(process, length, seed), 0, 0
    while position < length:
        position += 1 + min(k, runs[position])
        rounds += 1
    return rounds


# What a process meets: plain rounds that tracing a round takes, how the machine's load
# comes and goes, and what drafting beside a plain round takes, in plain rounds.
TRACINGS = (3, 10, 30)
SHADOW = (0.1, 0.1)  # for the first of a kind and for each draft


def load(seed, length, *, is_busy):
    """Factors of a machine's times: it is idle, or has others beside it for a while."""
    rng = random.Random(f"load {seed}")
    factors: list[float] = []
    while len(factors) < length:
        factors += [1.0] * rng.randint(20, 400)
        if is_busy:
            factors += [rng.choice([1.3, 1.6, 2.0, 3.0])] * rng.randint(20, 400)
    return factors[:length]


def shadow_cost(depth):
    return SHADOW[0] + SHADOW[1] * depth if depth else 0.0


class Mail:
    """What a controller is told, some rounds late.

    Args:
        controller: Who is told.
        runs: For each position, how many of unlimited drafts would be accepted.
        lag: By how many rounds.

    Attributes:
        known: Tokens of the rounds that were told.
    """

    def __init__(self, controller, runs, lag):
        self.known = 0
        self._controller, self._runs, self._lag = controller, runs, lag
        self._rounds: list[tuple[int, int, float | None, int, int]] = []
        self._shadows: list[tuple[int, int]] = []

    def send(self, position, k, seconds, depth, context):
        """A round of K drafts has been run there, with so many beside it."""
        self._rounds.append((position, k, seconds, depth, context))
        if depth:
            self._shadows.append((position, depth))
        self.deliver(self._lag)

    def deliver(self, lag):
        """Tell all but the last rounds, and of drafts whose tokens have come."""
        while len(self._rounds) > lag:
            position, k, seconds, depth, context = self._rounds.pop(0)
            num_accepted = min(k, self._runs[position])
            self._controller.observe(
                k, [num_accepted], seconds, num_shadow_drafts=depth, context=context
            )
            self.known += 1 + num_accepted
        while self._shadows and self.known >= sum(self._shadows[0]) + 1:
            position, depth = self._shadows.pop(0)
            self._controller.observe_shadow(depth, [min(depth, self._runs[position])])


class Machine:
    """A machine and a text, on which processes begin and end.

    Args:
        curve: Round times by K.
        process: The text.
        tracing: Plain rounds that the first round of a K takes on top, in a process.
        is_busy: Whether others load the machine now and then.
        can_shadow: Whether drafts may be made beside plain rounds.
        seed: Of text, noise and load.

    Attributes:
        setup_s: What it took to trace the last time, for who asks.
        chosen: In the last process, tokens before each round and its K.
    """

    def __init__(
        self, curve, process, *, tracing, is_busy=False, can_shadow=True, seed=0
    ):
        self.can_shadow = can_shadow
        self.costs, self.process = CURVES[curve], process
        self.tracing, self.is_busy, self.seed = tracing, is_busy, seed
        self.setup_s = 0.2  # what is thought until one was seen
        self.num_processes = 0
        self.chosen: list[tuple[int, int]] = []

    def run(self, controller, length, *, lag=1):
        """Emit so many tokens in a new process; the time that it took."""
        self.num_processes += 1
        seed = f"{self.seed} {self.num_processes}"
        controller.start()
        return self.emit(
            controller,
            text(self.process, length, seed),
            noise(seed, length),
            load(seed, length, is_busy=self.is_busy),
            lag=lag,
        )

    def emit(self, controller, runs, factors, loads, *, lag):
        """Emit a text; the time that it took.

        Args:
            controller: Who chooses.
            runs: For each position, how many of unlimited drafts would be accepted.
            factors: Of each round's time, as it is observed.
            loads: The same of the machine, which tracing has too.
            lag: By how many rounds observations come late.
        """
        mail = Mail(controller, runs, lag)
        traced: set[int] = set()
        position = 0
        time = 0.0
        self.chosen = []
        for factor, busy in zip(factors, loads, strict=True):
            k = controller.choose(
                setup_s=self._setups(traced),
                tokens_left=len(runs) - mail.known,
                can_shadow=self.can_shadow,
                context=self.told_context(position),
            )
            depth = controller.num_shadow_drafts
            self.chosen.append((position, k))
            took = self.cost(k, position) + shadow_cost(depth)
            seconds = PLAIN_S * took * factor * busy
            if self.tracing and k not in traced:
                traced.add(k)
                took += self.tracing
                self.setup_s = PLAIN_S * self.tracing * busy
                seconds = None  # it says nothing of the next ones
            time += took
            mail.send(position, k, seconds, depth, self.told_context(position))
            position += 1 + min(k, runs[position])
            if position >= len(runs):
                break
        mail.deliver(0)
        return time

    def cost(self, k, position):
        """Plain rounds that one of K drafts takes behind so many tokens of the text."""
        return self.costs[k]

    def told_context(self, position):
        """The length of context that the controller is told there."""
        return 0

    def _setups(self, traced):
        if not self.tracing:
            return {}
        return {k: self.setup_s for k in range(DEPTH + 1) if k not in traced}

    def best_fixed(self, lengths):
        """Plain rounds that the best fixed K takes for processes of such lengths."""
        return min(self.fixed(lengths, k) for k in range(DEPTH + 1))

    def fixed(self, lengths, k):
        """The same for one K; it is traced in each process."""
        return sum(
            self.tracing
            + self.costs[k]
            * rounds_of_fixed(self.process, n, f"{self.seed} {i + 1}", k)
            for i, n in enumerate(lengths)
        )


def time_of(controller, curve, process, length, seed, *, lag=1, chosen=None):
    """Time that a controller's rounds take for a text; `chosen` gets their K's.

    Nothing must be traced. Drafts are made beside rounds where the controller asks.

    Args:
        lag: By how many rounds observations come late.
    """
    machine = Machine(curve, process, tracing=0)
    runs, idle = text(process, length, seed), [1.0] * length
    time = machine.emit(controller, runs, noise(seed, length), idle, lag=lag)
    if chosen is not None:
        chosen += [k for _, k in machine.chosen]
    return time


def saved_and_loaded(controller):
    return DraftLengthController.from_dict(json.loads(json.dumps(controller.to_dict())))


def next_process(controller, prior=DEFAULT_PRIOR):
    """What another process goes on with."""
    controller = saved_and_loaded(controller)
    controller.resume(prior)
    return controller


def gains(curve, process, num_seeds, *, warm, prior=DEFAULT_PRIOR):
    """Mean throughput over that of the best fixed K, and over plain decoding; less 1.

    Args:
        warm: 500 tokens by a controller that knows 2,000 others of the same process;
            otherwise 2,000 tokens by one that knows the prior.
    """
    length = 500 if warm else 2000
    own = 0.0
    fixed = [0.0] * (DEPTH + 1)
    for seed in range(num_seeds):
        controller = DraftLengthController(prior)
        controller.start()
        if warm:
            time_of(controller, curve, process, 2000, 100_000 + seed)
            controller = next_process(controller, prior)
            controller.start()
        own += length / time_of(controller, curve, process, length, seed)
        for k in range(DEPTH + 1):
            fixed[k] += length / time_of_fixed(curve, process, length, seed, k)
    return own / max(fixed) - 1, own / fixed[0] - 1
