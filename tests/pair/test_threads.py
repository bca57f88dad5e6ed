"""Several threads on one pair, and what ends: texts, traces, weights, memory.

Run: python -m pytest tests/pair/test_threads.py; the long ones: make test-threads
"""

from __future__ import annotations

import gc
import random
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from operator import is_
from typing import Any
from weakref import ref

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors

from mlx_gemma_mtp.checkpoints.weights import load_drafter
from mlx_gemma_mtp.drafting.controller import DraftLengthController
from mlx_gemma_mtp.drafting.policy import DraftPolicy, Learning, Way
from mlx_gemma_mtp.engine import traces as traces_module
from mlx_gemma_mtp.engine.decoder import Decoder, Request
from mlx_gemma_mtp.engine.model_arrays import (
    ArraysChangedError,
    CompiledFunction,
    ModelArrays,
)
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.engine.traces import Traces
from mlx_gemma_mtp.generation.text import stream_generate
from mlx_gemma_mtp.generation.tokens import generate_tokens, make_batch_decoder
from mlx_gemma_mtp.hook.batch_generator import BatchGenerator
from mlx_gemma_mtp.pair.calibration import Calibration
from mlx_gemma_mtp.pair.pair import Kept, Pair, attach, pair_of
from mlx_gemma_mtp.sampling.params import SamplingParams
from tests.engine.test_joining import chain_text, check_against_alone, check_chains
from tests.generation.test_stop import before_the_stop
from tests.scripted import ChainDrafter, ChainTarget
from tests.tiny import (
    SHORT,
    family_folder,
    new_pair,
    reference_pair,
    tiny_tokenizer,
    uncompiled,
)

pytestmark = pytest.mark.usefixtures("every_core")

PROMPT = [2, 17, 300, 45, 9]


@contextmanager
def workers(count: int) -> Iterator[list[ThreadPoolExecutor]]:
    """Threads to run things on; MLX wants them to give back what it keeps for them."""
    with ExitStack() as stack:
        pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(count)]
        yield pools
        for pool in pools:
            pool.submit(mx.clear_streams).result()


def run_on(pool: ThreadPoolExecutor, function: Callable[..., Any], *args: Any) -> Any:
    return pool.submit(function, *args).result()


def item_of(array: mx.array, place: int) -> Any:
    return array[place].item()


def run_together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """The same work on so many threads at the same time, each with its number."""
    with workers(count) as pools:
        running = [pool.submit(work, i) for i, pool in enumerate(pools)]
        return [future.result() for future in running]


def disturb(pair: Pair, seed: int) -> None:
    """Exchange a matrix of the target for another one."""
    layer = pair.target.language_model.model.layers[0].mlp.down_proj
    noise = mx.random.normal(layer.weight.shape, key=mx.random.key(seed))
    layer.weight = layer.weight + (0.5 * noise).astype(layer.weight.dtype)
    mx.eval(layer.weight)


def decode(pair: Pair, count: int, prompt: list[int] = PROMPT, size: int = 10) -> Any:
    return list(
        generate_tokens(
            pair,
            prompt,
            max_tokens=size,
            num_draft_tokens=count,
            exactness="fast",
            eos_token_ids=(),
        )
    )


def plain(pair: Pair, prompt: list[int] = PROMPT, size: int = 10) -> list[int]:
    """The text by the weights as they are; nothing is compiled."""
    rounds = Rounds(pair.rounds.target, use_compile=False)
    decoder = Decoder(rounds, [Request(prompt, size)], num_draft_tokens=0)
    return [token for (emission,) in decoder.run() for token in emission.tokens]


def some_function() -> Callable[[], None]:
    return lambda: None


class TestTraces:
    """Functions are one thread's alone, and end with owner, thread, or age."""

    def test_the_limit_holds_for_all_owners_of_a_thread(self, monkeypatch):
        monkeypatch.setattr(traces_module, "MAX_TRACES", 3)
        (found,) = run_together(1, lambda _: self._fill_two_owners())
        assert found == [(["a", "b"], []), (["a", "b"], ["x"]), (["a"], ["x", "y"])]

    def _fill_two_owners(self):
        first, second = (Traces[Any]() for _ in range(2))

        def kept():
            return [k for k in "ab" if k in first], [k for k in "xyz" if k in second]

        found = []
        first.add("b", some_function())
        first.add("a", some_function())
        found.append(kept())
        second.add("x", some_function())
        assert first.get("a") is not None
        found.append(kept())
        second.add("y", some_function())
        found.append(kept())
        return found

    def test_what_has_ended_takes_no_room(self, monkeypatch):
        monkeypatch.setattr(traces_module, "MAX_TRACES", 3)

        def work(_):
            kept = Traces[Any]()
            kept.add("a", some_function())
            for i in range(20):
                Traces[Any]().add(i, some_function())
            return "a" in kept

        assert run_together(1, work) == [True]

    def test_other_threads_keep_theirs(self, monkeypatch):
        monkeypatch.setattr(traces_module, "MAX_TRACES", 2)
        traces = Traces[Any]()
        with workers(2) as (a, b):
            for i in range(2):
                run_on(a, traces.add, i, some_function())
            for i in range(10):
                run_on(b, traces.add, i, some_function())
            assert [run_on(pool, len, traces) for pool in (a, b)] == [2, 2]
            assert run_on(a, traces.get, 1) is not None
            assert run_on(b, traces.get, 1) is None
            assert 1 not in traces  # of this thread there is nothing

    @pytest.mark.parametrize("how", ["owner", "thread", "structure"])
    def test_functions_end_with(self, how):
        traces = Traces[Any]()
        with workers(2) as pools:
            references = [
                ref(run_on(pool, traces.add, 1, some_function())) for pool in pools
            ]
            for pool in pools:
                run_on(pool, int)  # lets go of what the last call has returned
            assert None not in [reference() for reference in references]
            if how == "owner":
                del traces
            elif how == "structure":
                traces.fit(("another",))
            else:
                for pool in pools:
                    pool.shutdown()
            assert [reference() for reference in references] == [None, None]
            if how == "thread":
                pools.clear()

    def test_none_answers_for_another_at_its_address(self):
        """MLX erases only the last caller's part of what two threads have called."""
        with workers(2) as pools:
            for i in range(40):
                traces, said = Traces[Any](), []
                for pool in pools:
                    said.append(run_on(pool, self._call, traces, i))
                assert said == [i, i]

    def _call(self, traces, number):
        function = traces.add("it", CompiledFunction(lambda _, x: x + number))
        return function(lambda _: None, [], mx.array(0)).item()


class TestWeights:
    """A round computes with the weights as they are, on every thread."""

    def test_exchanged_between_two_threads(self):
        pair = new_pair()
        with workers(2) as (a, b):
            for seed in range(3):
                disturb(pair, seed)
                expected = plain(pair)
                for pool in (b, a, b):
                    assert run_on(pool, decode, pair, 3) == expected

    def test_another_model_in_the_same_place(self):
        with workers(2) as (a, b):
            for seed in range(3):
                pair = new_pair()
                disturb(pair, seed)
                expected = plain(pair)
                for pool in (b, a, b):
                    assert run_on(pool, decode, pair, 2) == expected

    @pytest.mark.parametrize("count", [0, 3])
    def test_changed_in_place(self, count):
        pair = new_pair()
        texts = [decode(pair, count)]
        layer = pair.target.language_model.model.layers[0].mlp.down_proj
        noise = mx.random.normal(layer.weight.shape, key=mx.random.key(1))
        for _ in range(2):
            layer.weight += (0.5 * noise).astype(layer.weight.dtype)
            mx.eval(layer.weight)
            texts.append(decode(pair, count))
            assert texts[-1] == plain(pair)
        layer.weight[0] = 9
        mx.eval(layer.weight)
        texts.append(decode(pair, count))
        assert texts[-1] == plain(pair)
        assert len({tuple(text) for text in texts}) == 4

    def test_changed_in_place_while_rows_decode(self):
        """A batch that has run for long takes them too, those exchanged as well."""
        pair = new_pair()
        decoder = make_batch_decoder(pair, num_draft_tokens=2)
        for seed in range(3):
            disturb(pair, seed)
            row = decoder.add(Request(PROMPT, 10))
            while not decoder.is_idle:
                decoder.step()
            assert row.emitted == plain(pair)
        decoder.close()

    def test_other_numbers_and_layers_are_traced_anew(self):
        """Plain numbers of modules are part of a trace; so are quantized layers."""
        pair = new_pair()
        decode(pair, 2)
        model = pair.target.language_model.model
        for layer in model.layers:
            layer.self_attn.scale *= 0.5
        assert decode(pair, 2) == plain(pair)
        nn.quantize(model.layers[0].mlp, group_size=32, bits=4)
        assert decode(pair, 2) == plain(pair)

    def test_numbers_that_change_between_two_texts_are_followed(self):
        """Also where nobody says so: nothing is held behind a text's end."""
        pair = new_pair()

        def speak():
            decoder = Decoder(pair.rounds, [Request(PROMPT, 10)], num_draft_tokens=2)
            return [token for (e,) in decoder.run() for token in e.tokens]

        assert speak() == plain(pair)
        for layer in pair.target.language_model.model.layers:
            layer.self_attn.scale *= 0.5
        assert speak() == plain(pair)

    def test_modules_are_not_touched_while_they_are_traced(self):
        pair = new_pair()
        arrays = ModelArrays(pair.target, pair.drafter)
        before, structure = arrays.read()
        stand_ins = [mx.zeros_like(array) for array in before]
        model, drafter = arrays.bound(before, stand_ins)
        assert all(map(is_, arrays.read()[0], before))
        bound = ModelArrays(model, drafter).read()
        assert all(map(is_, bound[0], stand_ins))
        assert bound[1] == structure

    def test_arrays_that_were_exchanged_meanwhile_are_read_again(self):
        pair = new_pair()
        arrays = ModelArrays(pair.target, pair.drafter)
        before, _ = arrays.read()
        disturb(pair, 0)
        with pytest.raises(ArraysChangedError):
            arrays.bound(before, before)


@pytest.fixture(scope="module")
def model():
    pair = new_pair()
    attach(pair.target, pair)
    return pair.target


class TestMoving:
    """What one thread has begun another one goes on with, at every step."""

    def _collect(self, pools, make):
        """What a generator says, every step on the next thread."""

        def step(generator):
            response = next(generator, None)
            if response is None:
                return None
            top = response.logprobs
            return response.token, top

        generator, turn = run_on(pools[0], make), 0
        said: list[Any] = []
        while True:
            turn += 1
            found = run_on(pools[turn % len(pools)], step, generator)
            if found is None:
                return said
            token, logprobs = found
            value = run_on(pools[turn % 2 - 1], item_of, logprobs, token)
            said.append((token, pytest.approx(value, abs=1e-4)))

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"temp": 0.8, "top_k": 20, "seed": 3},
            {"logits_processors": make_logits_processors(None, 1.2, 20)},
        ],
        ids=["greedy", "sampled", "processors"],
    )
    def test_a_generator(self, model, settings):
        def make():
            return stream_generate(
                model,
                tiny_tokenizer(),
                PROMPT,
                max_tokens=9,
                num_draft_tokens=2,
                exactness="fast",
                **settings,
            )

        with uncompiled(), workers(3) as pools:
            assert self._collect(pools, make) == self._collect(pools[:1], make)

    def test_a_generator_that_follows_a_prompt_cache(self, model):
        """Made by one thread, begun by another one."""

        def play(pools):
            cache = make_prompt_cache(model)

            def make():
                return stream_generate(
                    model,
                    tiny_tokenizer(has_eos=False),
                    PROMPT,
                    max_tokens=4,
                    num_draft_tokens=2,
                    exactness="fast",
                    prompt_cache=cache,
                )

            return [self._collect(pools, make) for _ in range(2)]

        with uncompiled(), workers(3) as pools:
            assert play(pools) == play(pools[:1])

    @pytest.mark.parametrize("look_ahead", [True, False])
    def test_rows_that_end_before_others(self, look_ahead):
        rounds = Rounds(ChainTarget(), ChainDrafter(), use_compile=False)
        requests = [Request([4], limit) for limit in (3, 5, 20)]

        def make():
            decoder = Decoder(
                rounds, requests, num_draft_tokens=1, look_ahead=look_ahead
            )
            return decoder.run()

        texts: list[list[int]] = [[] for _ in requests]
        with workers(2) as pools:
            run, turn = run_on(pools[0], make), 0
            while emissions := run_on(pools[turn % 2], next, run, None):
                turn += 1
                for emission in emissions:
                    texts[emission.sequence.index] += emission.tokens
        assert texts == [chain_text([4], limit) for limit in (3, 5, 20)]

    def test_a_batch(self, model):
        """Rows join, leave and give their caches; slabs grow and shrink."""

        def play(pools):
            turn = iter(range(10**6))

            def go(function, *args, **options):
                pool = pools[next(turn) % len(pools)]
                return pool.submit(function, *args, **options).result()

            batch = go(BatchGenerator, model, max_tokens=12, num_draft_tokens=2)
            uids, sums = [], []
            said: dict[int, list[int]] = {}
            for step in range(26):
                if step in (0, 2, 3, 9):
                    prompts = [
                        [*PROMPT, step, i] * (1 + i) for i in range(1 + step % 3)
                    ]
                    uids += go(batch.insert, prompts)
                for response in go(batch.next)[1]:
                    said.setdefault(response.uid, []).append(response.token)
                if step == 5:
                    caches = go(batch.extract_cache, uids[:1])
                    (cache, tokens) = caches[uids[0]]
                    sums = [go(lambda c=c: c.keys.sum().item()) for c in cache]
                    sums.append(len(tokens))
            go(batch.close)
            return said, sums

        with uncompiled(), workers(3) as pools:
            said, sums = play(pools)
            said_alone, sums_alone = play(pools[:1])
            assert said == said_alone
            assert sums == pytest.approx(sums_alone)
            assert {len(tokens) for tokens in said.values()} == {12}


class TestLifetimes:
    """Nothing is kept that nobody uses; no cycle waits for the collector."""

    @pytest.fixture(autouse=True)
    def _no_collector(self):
        gc.collect()
        gc.disable()
        yield
        gc.enable()

    def _speak(self, model, **options):
        for _ in stream_generate(
            model,
            tiny_tokenizer(),
            PROMPT,
            max_tokens=4,
            exactness="fast",
            **options,
        ):
            pass

    def test_a_model_ends_at_once(self):
        """With its weights, though several threads have decoded with it."""
        pair = new_pair()
        model = pair.target
        attach(model, pair)
        del pair
        arrays = [ref(array) for array in ModelArrays(model, None).read()[0]]
        self._speak(model, num_draft_tokens=2)
        self._speak(model)  # by the controller
        with workers(1) as (pool,):
            run_on(pool, self._speak, model)
            run_on(pool, int)
            reference = ref(model)
            del model
            assert reference() is None
            assert not [array for array in arrays if array() is not None]

    def test_a_weight_that_was_exchanged_ends_at_once(self):
        """The pair that has decoded with it goes on."""
        pair = new_pair()
        layer = pair.target.language_model.model.layers[0].mlp.down_proj
        for seed in range(3):  # at first nothing has decoded
            before = ref(layer.weight)
            disturb(pair, seed)
            assert before() is None
            decode(pair, 2)
        decoder = make_batch_decoder(pair, num_draft_tokens=2)
        decoder.add(Request(PROMPT, 3))
        while not decoder.is_idle:
            decoder.step()
        decoder.step()  # lets go of the slabs, and of the weights
        before = ref(layer.weight)
        disturb(pair, 3)
        assert before() is None
        decoder.close()

    def test_a_pair_ends_at_once(self):
        pair = new_pair()
        decode(pair, 2)
        parts: list[Any] = [pair, pair.target, pair.drafter, pair.kept]
        references = [ref(part) for part in parts]
        del parts
        del pair
        assert [reference() for reference in references] == [None] * 4

    def test_a_drafter_given_by_hand_ends_at_once(self):
        model = new_pair().target
        references: list[Any] = []
        for _ in range(2):
            drafter = load_drafter(family_folder(SHORT) / "drafter")
            self._speak(model, draft_model=drafter, num_draft_tokens=2)
            kept = pair_of(model, drafter).kept
            assert pair_of(model, drafter).kept is kept
            assert pair_of(model).drafter is None
            references += [ref(drafter), ref(kept)]
            del drafter, kept
        assert [reference() for reference in references] == [None] * 4

    def test_rounds_serve_the_next_call(self):
        pair = new_pair()
        attach(pair.target, pair)
        decode(pair_of(pair.target), 2)
        num_traces = len(pair.kept.traces)
        decode(pair_of(pair.target), 2)
        assert len(pair.kept.traces) == num_traces > 0

    def test_what_was_learnt_goes_with_the_weights(self):
        pair = new_pair()
        attach(pair.target, pair)
        learnt = pair.calibration
        pair_of(pair.target).refresh()
        assert pair_of(pair.target).calibration is learnt
        disturb(pair, 1)
        pair_of(pair.target).refresh()
        assert pair_of(pair.target).calibration is not learnt


class Forgetful(Kept):
    """Whose weights another thread exchanges whenever something is learnt of them."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, None if name == "calibration" else value)


class OwnedLock:
    """A lock that knows whether it is held."""

    is_held = False

    def __enter__(self) -> None:
        self.is_held = True

    def __exit__(self, *_: object) -> None:
        self.is_held = False


class TestLearning:
    """What several threads learn of one pair."""

    def test_weights_that_change_while_it_is_asked_for(self):
        pair = new_pair()
        pair.kept = Forgetful()
        assert isinstance(pair.calibration, Calibration)

    def test_what_tracing_took_is_noted_under_the_lock(self):
        """Who keeps what was learnt goes over the same list."""
        lock = OwnedLock()

        class Setups(deque[float]):
            def append(self, seconds: float) -> None:
                assert lock.is_held
                super().append(seconds)

            def __len__(self) -> int:
                assert lock.is_held
                return super().__len__()

        learning = Learning(
            lambda *kind: DraftLengthController(), Setups(), lock, keep=lambda: None
        )
        policy = DraftPolicy(None, learning=learning)
        policy = policy.for_batch(1, rule="greedy", context=0)
        policy.observe_setup(0.5)
        way = policy.choose([0, 1], not_ready=[Way(1)], tokens_left=None)
        assert way in (Way(0), Way(1))


PLANS = (8, 20, 40, 12)  # most steps before, tokens of a prompt and text, steps until


def play_chains(rounds: Rounds, rng: random.Random) -> None:
    """The fuzzer of joining rows."""
    waits, length, limit, cancel = PLANS
    plans = [
        (
            rng.randint(0, waits),
            [rng.randrange(96) for _ in range(rng.randint(1, length))],
            rng.randint(1, limit),
            rng.choice([0, 1, 8]),
            rng.choice([None, rng.randint(0, cancel)]),
        )
        for _ in range(rng.randint(1, 9))
    ]
    check_chains(
        rounds,
        plans,
        num_draft_tokens=rng.randint(0, 8),
        max_rows=rng.choice([1, 3, 32]),
        prefill_step_size=rng.choice([1, 7, 2048]),
    )


def some_prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(8, 512) for _ in range(rng.randint(1, 30))]


def play_rows(pair: Pair, rng: random.Random) -> None:
    """Rows of the pair that arrive at random, and each one alone."""
    requests = [
        Request(
            some_prompt(rng),
            rng.choice([1, 3, 12]),
            SamplingParams(1.0, 0.95, 64, seed=i) if i % 2 else SamplingParams(),
        )
        for i in range(8)
    ]
    check_against_alone(
        pair, requests, rng, num_draft_tokens=rng.choice([0, 2, 4]), max_rows=4
    )


def play_stops(pair: Pair, rng: random.Random) -> None:
    """Stop strings out of the text, which ends before the first of them."""

    def speak(count, stop):
        return "".join(
            response.text
            for response in stream_generate(
                pair.target,
                tiny_tokenizer(),
                prompt,
                max_tokens=24,
                num_draft_tokens=count,
                exactness="fast",
                stop=stop,
            )
        )

    prompt = some_prompt(rng)
    text = speak(0, ())
    starts = [rng.randrange(max(len(text) - 3, 1)) for _ in range(2)]
    stops = [text[i : i + rng.randint(1, 4)] for i in starts]
    assert speak(rng.randint(1, 6), stops) == before_the_stop(text, stops)


def play_caches(pair: Pair, rng: random.Random) -> None:
    """Turns that a prompt cache holds together, against each turn without it."""
    cache = make_prompt_cache(pair.target)
    history: list[int] = []
    for _ in range(3):
        history += some_prompt(rng)
        count = rng.randint(1, 8)
        said = [
            response.token
            for response in stream_generate(
                pair.target,
                tiny_tokenizer(has_eos=False),
                history[cache[0].offset :],
                max_tokens=count,
                num_draft_tokens=rng.randint(0, 4),
                exactness="fast",
                prompt_cache=cache,
            )
        ]
        assert said
        assert said == decode(pair, 0, history, count)[: len(said)]
        history += said


def play_pairs(pair: Pair, rng: random.Random) -> None:
    """A pair of one's own, whose weights change, beside the one that all share."""
    own = new_pair(rng.choice(["12b", "e2b"]))
    disturb(own, rng.randrange(1000))
    for used in (own, pair, own):
        prompt = some_prompt(rng)
        assert decode(used, rng.randint(0, 5), prompt) == plain(used, prompt)


FUZZERS = (play_rows, play_stops, play_caches, play_pairs)


class TestTogether:
    """Threads that decode at the same time say what each says alone."""

    def test_chains(self):
        rounds = Rounds(ChainTarget(), ChainDrafter(), use_compile=False)

        def work(number):
            rng = random.Random(number)
            for _ in range(4):
                play_chains(rounds, rng)

        run_together(4, work)

    def test_a_pair(self, monkeypatch):
        monkeypatch.setattr(traces_module, "MAX_TRACES", 3)
        pair = reference_pair()

        def work(number):
            play_pairs(pair, random.Random(number))

        run_together(4, work)

    @pytest.mark.threads
    @pytest.mark.parametrize("count", [2, 4])
    @pytest.mark.parametrize("play", FUZZERS)
    def test_fuzzers(self, play, count, monkeypatch):
        monkeypatch.setattr(traces_module, "MAX_TRACES", 12)
        pair = reference_pair()
        attach(pair.target, pair)

        def work(number):
            rng = random.Random(number)
            for _ in range(40 // count):
                play(pair, rng)

        run_together(count, work)

    @pytest.mark.threads
    @pytest.mark.parametrize("count", [2, 4])
    def test_2000_texts(self, count, monkeypatch):
        """Pairs are dropped and weights change in between, of all threads at once."""
        monkeypatch.setattr(traces_module, "MAX_TRACES", 5)
        rng, num_texts, seed = random.Random(count), 0, 0
        with workers(count) as pools:
            while num_texts < 2000:
                pair = new_pair(rng.choice(["12b", "e2b"]))
                for _ in range(4):
                    disturb(pair, seed := seed + 1)
                    prompts = [some_prompt(rng) for _ in range(3)]
                    texts = [plain(pair, prompt) for prompt in prompts]
                    running = []
                    for i in range(6 * count):
                        call = (decode, pair, rng.randint(0, 4), prompts[i % 3])
                        running.append((i % 3, pools[i % count].submit(*call)))
                    for place, future in running:
                        assert future.result() == texts[place]
                    num_texts += len(running)
