"""mlx-lm's own functions with a drafter: the same text, other models untouched.

Run: python -m pytest tests/hook/test_install.py
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import logging
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.sample_utils import make_logits_processors, make_sampler

import mlx_gemma_mtp
from mlx_gemma_mtp.checkpoints.weights import load_drafter
from mlx_gemma_mtp.errors import HookError, PairingError, RequestError
from mlx_gemma_mtp.generation.response import GenerationResponse
from mlx_gemma_mtp.generation.text import generate as generate_text
from mlx_gemma_mtp.hook import install as hook
from mlx_gemma_mtp.hook import replacements as hooked
from mlx_gemma_mtp.hook import table as hook_table
from mlx_gemma_mtp.hook.install import install, uninstall
from mlx_gemma_mtp.pair.pair import carries_drafter, pair_of
from tests.embedded import PROMPTS, float32_pair
from tests.gemma_pair import let_say
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("plain_graphs")

# What the hook adds to them has no types there.
mlx_lm: Any = importlib.import_module("mlx_lm")
generation: Any = sys.modules["mlx_lm.generate"]  # the attribute is a function


# Inside the window of 32 tokens with every prompt.
MAX_TOKENS = 6
# What has been seen in the configs of float weights.
STALE: list[Any] = [
    "q4_0",
    ["q4_0"],
    {},
    {"quant_type": "q4_0"},
    {"bits": 4},
    {"quant_method": "gptq"},
    {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    {"quant_method": "fp8", "weight_block_size": 128, "scale_fmt": "ue8m0"},
    {"quant_method": "compressed-tensors", "config_groups": {}},
]
SAMPLER = make_sampler(temp=0.9, top_k=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return float32_pair(tmp_path_factory.mktemp("hook") / "pair")


@pytest.fixture(scope="module")
def plain(folder):
    """Model and tokenizer as mlx-lm loads them."""
    return mlx_lm.load(str(folder))


@pytest.fixture(scope="module")
def small_folder(gemma_pair_folder):
    """A random pair of few layers, for tests in which no draft needs to be right."""
    return gemma_pair_folder("may-12b")


@pytest.fixture(scope="module")
def small_plain(small_folder):
    return mlx_lm.load(str(small_folder))


@pytest.fixture
def small_drafted(small_folder, hooked_names):
    return mlx_lm.utils.load(str(small_folder))


@pytest.fixture
def hooked_names():
    """Every name of the table, replaced; given back at the end.

    The number of drafts is fixed: how many are fastest depends on what else runs.
    """
    install(num_draft_tokens=3)
    yield
    uninstall()


@pytest.fixture
def drafted(folder, hooked_names):
    """Model and tokenizer as the hooked function loads them."""
    return mlx_lm.utils.load(str(folder))


@pytest.fixture
def tokenizer(plain):
    ends = set(plain[1].eos_token_ids)
    yield plain[1]
    plain[1].eos_token_ids = ends


def own(name):
    """mlx-lm's own function, hook or not."""
    (found,) = {
        inspect.unwrap(getattr(importlib.import_module(row.module), name))
        for row in hook_table.REPLACED
        if row.name == name
    }
    return found


def told(responses):
    """What a caller sees of responses, but for drafts and speed."""
    return [
        (r.text, r.token, r.finish_reason, r.prompt_tokens, r.generation_tokens)
        for r in responses
    ]


def both(plain, drafted, prompt, **settings):
    """Responses of mlx-lm's own function and of the hooked one."""
    settings = {"max_tokens": MAX_TOKENS, **settings}
    expected = list(own("stream_generate")(*plain, prompt, **settings))
    return expected, hooked_responses(drafted, prompt, **settings)


@pytest.fixture(scope="module")
def expected(plain):
    """Responses of mlx-lm's own function to the first prompt."""
    return list(own("stream_generate")(*plain, PROMPTS[0], max_tokens=MAX_TOKENS))


def hooked_responses(drafted, prompt, **settings):
    settings = {"max_tokens": MAX_TOKENS, **settings}
    return list(generation.stream_generate(*drafted, prompt, **settings))


def state():
    """The hook that was made last."""
    assert hook._hook is not None
    return hook._hook


def current():
    """What every place of the table holds, where its module is imported."""
    return {
        (module, row.name): vars(sys.modules[module])[row.name]
        for row in hook_table.REPLACED
        for module in row.modules
        if module in sys.modules
    }


class TestText:
    def test_greedy_text_is_mlx_lms(self, expected, drafted):
        """Of other prompts below and in batches."""
        found = hooked_responses(drafted, PROMPTS[0])
        assert told(found) == told(expected)
        assert len(found) == MAX_TOKENS
        assert any(r.from_draft for r in found)
        assert not any(r.from_draft for r in expected)

    def test_log_probabilities(self, expected, drafted):
        found = hooked_responses(drafted, PROMPTS[0])
        for one, other in zip(found, expected, strict=True):
            assert one.logprobs.shape == other.logprobs.shape
            assert mx.allclose(one.logprobs, other.logprobs, atol=1e-3)

    def test_generate_draws_on_it(self, expected, drafted):
        text = "".join(r.text for r in expected)
        settings = {"max_tokens": MAX_TOKENS}
        assert mlx_lm.generate(*drafted, PROMPTS[0], **settings) == text
        assert mlx_lm.generate(*drafted, prompt=PROMPTS[0], **settings) == text

    def test_past_the_window(self, drafted):
        """Where mlx-lm's own rounding differs, this package's plain text counts."""
        install()  # with as many drafts as are fastest
        settings: Any = {"prompt": PROMPTS[0], "max_tokens": 32}
        expected = generate_text(*drafted, num_draft_tokens=0, **settings)
        assert mlx_lm.generate(*drafted, **settings) == expected

    def test_responses_have_all_fields(self):
        theirs = inspect.signature(generation.GenerationResponse).parameters
        ours = {*inspect.signature(GenerationResponse).parameters, "logprobs"}
        assert set(theirs) <= ours

    def test_an_end_token(self, plain, drafted, tokenizer):
        whole = hooked_responses(drafted, PROMPTS[0])
        tokenizer.eos_token_ids = [whole[5].token]
        drafted = (drafted[0], tokenizer)
        for max_tokens in (MAX_TOKENS, -1):
            expected, found = both(plain, drafted, PROMPTS[0], max_tokens=max_tokens)
            assert told(found) == told(expected)
            assert found[-1].finish_reason == "stop"

    def test_a_tokenizer_of_transformers(self, plain, drafted):
        bare = plain[1]._tokenizer
        expected, found = both((plain[0], bare), (drafted[0], bare), PROMPTS[1])
        assert told(found) == told(expected)

    def test_token_ids(self, expected, drafted, tokenizer):
        tokens = tokenizer.encode(PROMPTS[0])
        for prompt in (tokens, mx.array(tokens)):
            assert told(hooked_responses(drafted, prompt)) == told(expected)

    def test_processors_and_samplers(self, plain, drafted):
        processors = make_logits_processors({}, repetition_penalty=1.3)
        expected, found = both(
            plain,
            drafted,
            PROMPTS[2],
            logits_processors=processors,
            sampler=lambda logprobs: mx.argmax(logprobs, axis=-1),
        )
        assert told(found) == told(expected)

    def test_a_sampler_of_ones_own_draws_what_mlx_lm_draws(self, plain, drafted):
        found = []
        for functions in (own("stream_generate"), generation.stream_generate):
            mx.random.seed(11)
            responses = functions(
                *(plain if functions is own("stream_generate") else drafted),
                PROMPTS[0],
                max_tokens=MAX_TOKENS,
                sampler=lambda logprobs: mx.random.categorical(logprobs),
            )
            found.append(told(responses))
        assert found[0] == found[1]

    def test_no_tokens(self, plain, drafted):
        messages = []
        for model, function in (
            (plain, own("stream_generate")),
            (drafted, generation.stream_generate),
        ):
            responses = function(*model, PROMPTS[0], max_tokens=0)
            with pytest.raises(ValueError, match="must be non-zero") as caught:
                next(responses)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]

    def test_unknown_settings_are_a_type_error(self, drafted):
        with pytest.raises(TypeError, match="warp"):
            next(generation.stream_generate(*drafted, PROMPTS[0], warp=9))


class TestPromptCaches:
    def test_turns_of_a_chat(self, plain, drafted):
        """The prompt cache is mlx-lm's; it goes on with every turn."""
        texts = []
        for function, model in (
            (own("stream_generate"), plain),
            (generation.stream_generate, drafted),
        ):
            cache = mlx_lm.models.cache.make_prompt_cache(model[0])
            turns = [
                told(function(*model, prompt, max_tokens=6, prompt_cache=cache))
                for prompt in ("import ", "from ")
            ]
            texts.append((turns, {layer.offset for layer in cache}))
        assert texts[0] == texts[1]

    def test_one_goes_on_with_the_others(self, plain, drafted):
        make = mlx_lm.models.cache.make_prompt_cache
        functions = {
            "plain": (own("stream_generate"), plain),
            "drafted": (generation.stream_generate, drafted),
        }
        texts = []
        for first, second in (
            ("plain", "plain"),
            ("plain", "drafted"),
            ("drafted", "plain"),
        ):
            cache = make(plain[0])
            function, model = functions[first]
            list(function(*model, PROMPTS[0], max_tokens=6, prompt_cache=cache))
            function, model = functions[second]
            found = function(*model, PROMPTS[2], max_tokens=8, prompt_cache=cache)
            texts.append(told(found))
        assert texts[0] == texts[1] == texts[2]

    def test_progress_is_told(self, plain, drafted, tokenizer):
        calls = []
        num_tokens = len(tokenizer.encode(PROMPTS[0]))
        list(
            generation.stream_generate(
                *drafted,
                PROMPTS[0],
                max_tokens=2,
                prefill_step_size=4,
                prompt_progress_callback=lambda *seen: calls.append(seen),
            )
        )
        assert calls[0] == (0, num_tokens)
        assert calls[-1] == (num_tokens, num_tokens)
        assert len(calls) >= num_tokens // 4 + 1


class TestBatches:
    def prompts(self, tokenizer):
        return [tokenizer.encode(prompt) for prompt in PROMPTS]

    def test_batch_generate(self, plain, drafted):
        prompts = self.prompts(plain[1])
        expected = own_batch(plain, prompts)
        settings = {"max_tokens": MAX_TOKENS, "return_token_ids": True}
        found = mlx_lm.batch_generate(*drafted, prompts, **settings)
        assert found.texts == expected.texts
        assert found.token_ids == expected.token_ids
        assert found.stats.generation_tokens == sum(map(len, found.token_ids))

    def test_a_seed_gives_the_same_texts_again(self, drafted):
        prompts = self.prompts(drafted[1])
        texts = []
        for k in (0, 3):
            install(num_draft_tokens=k)
            mx.random.seed(5)
            settings = {"max_tokens": MAX_TOKENS, "sampler": SAMPLER}
            texts.append(mlx_lm.batch_generate(*drafted, prompts, **settings).texts)
        assert texts[0] == texts[1]
        mx.random.seed(6)
        again = mlx_lm.batch_generate(*drafted, prompts, **settings)
        assert again.texts != texts[0]

    def test_a_sampler_of_ones_own(self, plain, drafted):
        """Seeds are for samplers that draw from MLX; this one needs none."""
        mx.random.seed(5)
        prompts = self.prompts(plain[1])
        found = mlx_lm.batch_generate(
            *drafted,
            prompts,
            max_tokens=MAX_TOKENS,
            sampler=lambda logprobs: mx.argmax(logprobs, axis=-1),
        )
        assert found.texts == own_batch(plain, prompts).texts

    def test_the_engine_by_the_name_of_mlx_lms(self, drafted):
        install(num_draft_tokens=2)
        batch = generation.BatchGenerator(drafted[0], max_tokens=9)
        assert type(batch) is mlx_gemma_mtp.BatchGenerator
        (uid,) = batch.insert([drafted[1].encode(PROMPTS[0])])
        found = []
        while responses := batch.next_generated():
            found += responses
        assert [r.uid for r in found] == [uid] * 9
        batch.close()

    def test_subclasses_are_mlx_lms(self, drafted):
        """What somebody changes there is not there in this package's engine."""
        own_class = state().own.BatchGenerator
        batch = type("Sub", (generation.BatchGenerator,), {})(drafted[0])
        assert isinstance(batch, own_class)
        batch.close()


def own_batch(loaded, prompts):
    """mlx-lm's own batch."""
    batch = state().own.BatchGenerator(
        loaded[0], stop_tokens=[[token] for token in loaded[1].eos_token_ids]
    )
    uids = batch.insert(prompts, [MAX_TOKENS] * len(prompts))
    tokens: Any = {uid: [] for uid in uids}
    while responses := batch.next_generated():
        for response in responses:
            if response.finish_reason != "stop":
                tokens[response.uid].append(response.token)
    batch.close()
    texts = [loaded[1].decode(tokens[uid]) for uid in uids]
    return SimpleNamespace(texts=texts, token_ids=[tokens[uid] for uid in uids])


class TestSettings:
    def test_number_of_drafts(self, small_folder, hooked_names):
        model = mlx_lm.utils.load(str(small_folder))
        for k in (0, 2, 4):
            install(num_draft_tokens=k)
            *_, last = generation.stream_generate(*model, PROMPTS[0], max_tokens=9)
            assert set(last.stats.num_draft_tokens) == {k}

    def test_mlx_lms_own_number_counts_with_a_drafter_only(
        self, small_folder, small_drafted
    ):
        settings = {"max_tokens": 8, "num_draft_tokens": 3}
        install(num_draft_tokens=2)
        drafter = load_drafter(small_folder / "drafter")
        for named, k in ((None, 2), (drafter, 3)):
            *_, last = generation.stream_generate(
                *small_drafted, PROMPTS[0], draft_model=named, **settings
            )
            assert set(last.stats.num_draft_tokens) == {k}

    def test_a_drafter_that_is_named(self, folder, plain, hooked_names):
        """Without load: any Gemma 4 of mlx-lm."""
        drafter = load_drafter(folder / "drafter")
        settings: dict[str, Any] = {"max_tokens": MAX_TOKENS, "draft_model": drafter}
        expected, _ = both(plain, plain, PROMPTS[3])
        found = list(mlx_lm.stream_generate(*plain, PROMPTS[3], **settings))
        assert told(found) == told(expected)
        assert any(r.from_draft for r in found)
        settings["input_embeddings"] = mx.zeros(1)
        with pytest.raises(ValueError, match="does not support input embeddings"):
            next(mlx_lm.stream_generate(*plain, PROMPTS[3], **settings))

    def test_sizes_of_caches_are_ignored_as_by_mlx_lm(self, small_plain, small_drafted):
        """Gemma 4 makes its own caches; these numbers are never read."""
        expected, _ = both(small_plain, small_drafted, PROMPTS[0])
        for found in both(small_plain, small_drafted, PROMPTS[0], max_kv_size=4):
            assert told(found) == told(expected)

    def test_quantized_caches_are_refused_before_anything_runs(self, small_drafted):
        calls = []
        responses = generation.stream_generate(
            *small_drafted,
            PROMPTS[0],
            kv_bits=4,
            logits_processors=[lambda tokens, logits: calls.append(tokens)],
        )
        with pytest.raises(
            RequestError, match="rotating caches of Gemma 4's"
        ) as caught:
            next(responses)
        assert "\n" not in str(caught.value)
        assert not calls

    def test_that_mlx_lm_refuses_them_too(self, small_plain):
        """The reason that is given stays true, or the refusal has to go."""
        with pytest.raises(NotImplementedError, match="RotatingKVCache Quantization"):
            list(
                own("stream_generate")(
                    *small_plain,
                    PROMPTS[0],
                    max_tokens=2,
                    kv_bits=4,
                    quantized_kv_start=0,
                )
            )

    def test_images_are_decoded_by_mlx_lm(self, small_plain, small_drafted, caplog):
        hooked._note_embeddings.cache_clear()
        tokens = mx.array(small_plain[1].encode(PROMPTS[0]))
        embeddings = small_plain[0].language_model.model.embed_tokens(tokens)
        with caplog.at_level(logging.WARNING, "mlx_gemma_mtp"):
            for _ in range(2):
                expected, found = both(
                    small_plain, small_drafted, tokens, input_embeddings=embeddings
                )
                assert told(found) == told(expected)
                assert type(found[0]) is generation.GenerationResponse
        assert [r.message for r in caplog.records] == [
            "decoding without a drafter: input_embeddings (images) are mlx-lm's own"
        ]

    def test_a_number_out_of_range(self):
        with pytest.raises(RequestError, match="from 0 to 8, or auto: got 9"):
            install(num_draft_tokens=9)
        with pytest.raises(RequestError, match="auto, drafter or lookup: got 'text'"):
            install(draft_source="text")
        assert mlx_lm.load is own("load")

    def test_drafts_from_the_text(self, small_drafted):
        """The same text; the hook's setting reaches rows that join, too."""
        expected = list(
            generation.stream_generate(*small_drafted, PROMPTS[0], max_tokens=12)
        )
        install(num_draft_tokens=3, draft_source="lookup")
        found = list(
            generation.stream_generate(*small_drafted, PROMPTS[0], max_tokens=12)
        )
        assert [r.token for r in found] == [r.token for r in expected]
        assert found[-1].stats.drafted_from.keys() == {"lookup"}
        batch = generation.BatchGenerator(small_drafted[0], max_tokens=12)
        batch.insert([[2, 5, 6, 5, 6]])
        while batch.next_generated():
            pass
        assert batch._decoder.stats.drafted_from.keys() == {"lookup"}
        batch.close()


class TestSeeds:
    def sample(self, drafted, sampler=SAMPLER):
        found = list(
            generation.stream_generate(
                *drafted, PROMPTS[0], max_tokens=12, sampler=sampler
            )
        )
        return [r.token for r in found], found[-1].rule

    def test_a_seed_gives_the_same_text_again(self, drafted):
        found = []
        for k in (0, 3, None):
            install(num_draft_tokens=k)
            mx.random.seed(3)
            found.append([self.sample(drafted) for _ in range(2)])
        assert found[1:] == found[:-1]
        (first, rule), (second, _) = found[0]
        assert rule == "coupled (seed)"
        assert first != second  # the chance of one text twice is below 1e-4
        mx.random.seed(4)
        assert self.sample(drafted)[0] != first

    def test_without_one_more_drafts_are_accepted(self, small_drafted):
        tokens, rule = self.sample(small_drafted)
        assert rule == "block verification"
        assert self.sample(small_drafted)[0] != tokens

    def test_installing_forgets_seeds(self, small_folder, hooked_names):
        mx.random.seed(3)
        uninstall()
        install()
        assert (
            self.sample(mlx_lm.utils.load(str(small_folder)))[1] == "block verification"
        )

    def test_greedy_text_draws_no_number(self, small_drafted):
        mx.random.seed(3)
        random_state: Any = mx.random.state
        before = random_state[0].tolist()
        for sampler in (None, make_sampler(temp=0.0)):
            assert self.sample(small_drafted, sampler)[1] == "greedy"
        assert random_state[0].tolist() == before

    def test_threads_have_seeds_of_their_own(self, hooked_names):
        mx.random.seed(3)
        drawn: list[Any] = [state().draw_seed(SAMPLER)]
        thread = threading.Thread(
            target=lambda: drawn.append(state().draw_seed(SAMPLER))
        )
        thread.start()
        thread.join()
        assert 0 <= drawn[0] < 2**62
        assert drawn[1] is None


class TestLoad:
    def test_the_model_brings_its_drafter(self, drafted, folder):
        model, _ = drafted
        assert carries_drafter(model)
        pair = pair_of(model)
        assert pair.target_source == str(folder)
        assert "found inside the target's folder" in pair.drafter_source
        assert pair.eos_token_ids == {1}

    def test_arguments_of_mlx_lm(self, folder, hooked_names):
        model, tokenizer, config = mlx_lm.load(
            str(folder),
            {"eos_token": "<pad>"},
            {"quantize_activations": False},
            None,
            True,
            return_config=True,
            trust_remote_code=True,
            speculative_decoding=True,
        )
        assert carries_drafter(model)
        assert tokenizer.eos_token == "<pad>"
        assert config["quantize_activations"] is False
        settings = inspect.signature(mlx_lm.load).parameters
        assert list(settings) == [
            *inspect.signature(own("load")).parameters,
            "speculative_decoding",
            "draft_model",
        ]
        with pytest.raises(TypeError, match="warp"):
            mlx_lm.load(str(folder), warp=9)

    @pytest.mark.parametrize("default", [True, False])
    @pytest.mark.parametrize("said", [True, False, None])
    def test_switched_off(self, folder, hooked_names, default, said):
        install(speculative_decoding=default)
        model, _ = mlx_lm.load(str(folder), speculative_decoding=said)
        assert carries_drafter(model) is (default if said is None else said)

    def test_a_model_that_decodes_plainly_is_mlx_lms(self, folder, hooked_names):
        model = mlx_lm.load(str(folder), speculative_decoding=False)
        (found, *_) = generation.stream_generate(*model, PROMPTS[0], max_tokens=2)
        assert type(found) is generation.GenerationResponse

    @pytest.mark.parametrize("is_default", [True, False])
    def test_a_drafter_that_is_named(self, folder, tmp_path, hooked_names, is_default):
        shutil.copytree(folder, tmp_path / "pair")
        drafter = tmp_path / "elsewhere"
        (tmp_path / "pair" / "drafter").rename(drafter)
        install(draft_model=drafter if is_default else None)
        said = {} if is_default else {"draft_model": drafter}
        model, _ = mlx_lm.load(str(tmp_path / "pair"), **said)
        assert pair_of(model).drafter_source == f"drafter {drafter}: as named"

    def test_none_is_found(self, folder, tmp_path, hooked_names, caplog):
        ignore = shutil.ignore_patterns("drafter")
        shutil.copytree(folder, tmp_path / "alone", ignore=ignore)
        with caplog.at_level(logging.WARNING, "mlx_gemma_mtp"):
            model = mlx_lm.load(str(tmp_path / "alone"), speculative_decoding=True)
        assert "decoding without a drafter: no drafter found" in caplog.text
        (found, *_) = generation.stream_generate(*model, PROMPTS[0], max_tokens=2)
        assert type(found) is generation.GenerationResponse

    def test_a_drafter_is_no_model(self, folder, hooked_names):
        with pytest.raises(PairingError, match=r"got .*, a drafter") as caught:
            mlx_lm.load(str(folder / "drafter"))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("place", "stale", "given"),
        [
            *(("quantization_config", stale, {}) for stale in STALE),
            ("quantization", STALE[0], {}),
            ("quantization", STALE[4], {"model_config": {"mark": 1}}),
            ("text", STALE[0], {"model_config": {"mark": 1}}),
            ("text", STALE[4], {}),
        ],
    )
    def test_float_weights_whose_config_names_a_quantization(
        self, folder, plain, tmp_path, hooked_names, given, stale, place
    ):
        """Quantization-aware trained ones are such, and merged ones."""
        copied = tmp_path / "qat"
        shutil.copytree(folder, copied)
        config = json.loads((copied / "config.json").read_text())
        if place == "text":
            config["text_config"]["quantization_config"] = stale
        else:
            config[place] = stale
        (copied / "config.json").write_text(json.dumps(config))
        self.check_float(plain[0], copied, given)

    def test_float_weights_with_a_file_of_modelopt(
        self, folder, plain, tmp_path, hooked_names
    ):
        copied = tmp_path / "merged"
        shutil.copytree(folder, copied)
        said = {"quantization": {"quant_algo": "FP8"}}
        (copied / "hf_quant_config.json").write_text(json.dumps(said))
        self.check_float(plain[0], copied, {})

    def test_of_other_models_nothing_but_the_config_is_fetched(
        self, tmp_path, hooked_names, monkeypatch
    ):
        asked = []
        (tmp_path / "config.json").write_text('{"model_type": "warp"}')

        def hf_hub_download(repo, name, *, revision):
            asked.append((repo, name, revision))
            return str(tmp_path / name)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
        own_fetch: Any = lambda *args, **settings: tmp_path  # noqa: E731
        monkeypatch.setattr("mlx_lm.utils._download", own_fetch)
        with pytest.raises(FileNotFoundError, match="No safetensors found"):
            mlx_lm.load("warp/warp", revision="v1")
        assert asked == [("warp/warp", "config.json", "v1")]

    @staticmethod
    def check_float(own_model, place, given):
        model, _, found = mlx_lm.load(str(place), return_config=True, **given)
        assert carries_drafter(model)
        assert given.get("model_config", {}).items() <= found.items()
        expected = dict(tree_flatten(own_model.parameters()))
        loaded = dict(tree_flatten(model.parameters()))
        assert set(loaded) == set(expected)
        assert all(mx.array_equal(loaded[name], expected[name]) for name in loaded)

    def test_packed_weights_of_no_known_method_stay_mlx_lms(
        self, folder, tmp_path, hooked_names
    ):
        place = tmp_path / "packed"
        shutil.copytree(folder, place)
        config = json.loads((place / "config.json").read_text())
        config["quantization_config"] = {"quant_type": "q4_0"}
        (place / "config.json").write_text(json.dumps(config))
        weights: Any = mx.load(str(place / "model.safetensors"))
        weights["model.layers.0.mlp.up_proj.weight_packed"] = mx.zeros((4, 4))
        mx.eval(weights)
        mx.save_safetensors(str(place / "model.safetensors"), weights)
        with pytest.raises(KeyError, match="quant_method"):
            mlx_lm.load(str(place))

    def test_a_mistake_of_mlx_lms_stays(self, tmp_path, hooked_names):
        (tmp_path / "config.json").write_text('{"model_type": "warp"}')
        mx.save_safetensors(str(tmp_path / "model.safetensors"), {"a": mx.zeros(1)})
        with pytest.raises(ValueError, match="Model type warp not supported"):
            mlx_lm.load(str(tmp_path))


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """LoRA adapters that change the target's text."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    place = tmp_path_factory.mktemp("adapter")
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    model, _ = mlx_lm.load(str(folder))
    model.freeze()
    linear_to_lora_layers(model, 30, parameters)
    mx.random.seed(0)
    leaves: Any = tree_flatten(model.trainable_parameters())
    weights = {name: mx.random.normal(array.shape) * 0.03 for name, array in leaves}
    mx.save_safetensors(str(place / "adapters.safetensors"), weights)
    config = {"num_layers": 30, "lora_parameters": parameters, "fine_tune_type": "lora"}
    (place / "adapter_config.json").write_text(json.dumps(config))
    return str(place)


def test_adapters(expected, folder, adapter, hooked_names):
    adapted = own("load")(str(folder), adapter_path=adapter)
    drafted = mlx_lm.load(str(folder), adapter_path=adapter, speculative_decoding=True)
    assert carries_drafter(drafted[0])
    own_text, found = both(adapted, drafted, PROMPTS[0])
    assert told(found) == told(own_text)
    assert told(found) != told(expected)
    assert found[-1].stats.drafted > 0


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    """A tiny Llama with a tokenizer."""
    place = tmp_path_factory.mktemp("llama")
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 512,
    }
    mx.random.seed(1)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(place / "model.safetensors"), weights)
    (place / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(place)
    return str(place)


class TestOtherModels:
    def test_pass_through(self, other_folder, monkeypatch):
        calls = {}

        def record(name):
            function = own(name)

            def recorded(*args, **kwargs):
                calls[name] = args, kwargs
                calls[name, "result"] = function(*args, **kwargs)
                return calls[name, "result"]

            vars(recorded)["__signature__"] = inspect.signature(function)
            for row in hook_table.REPLACED:
                for module in row.modules if row.name == name else ():
                    if module in sys.modules:
                        monkeypatch.setattr(sys.modules[module], name, recorded)

        record("load")
        record("stream_generate")
        install()
        try:
            loaded = mlx_lm.load(other_folder, lazy=True, speculative_decoding=True)
            assert loaded is calls["load", "result"]
            assert calls["load"] == ((other_folder,), {"lazy": True})
            assert "_mtp_attached" not in vars(loaded[0])
            stream = mx.default_stream(mx.default_device())
            draft_model = object()
            found = mlx_lm.stream_generate(
                *loaded, "the", 3, draft_model, stream, num_draft_tokens=2, kv_bits=8
            )
            assert found is calls["stream_generate", "result"]
            args, kwargs = calls["stream_generate"]
            assert [id(a) for a in args] == [
                id(a) for a in (*loaded, "the", 3, draft_model, stream)
            ]
            assert kwargs == {"num_draft_tokens": 2, "kv_bits": 8}
        finally:
            uninstall()

    def test_text(self, other_folder, hooked_names):
        loaded = mlx_lm.load(other_folder)
        expected, found = both(loaded, loaded, "the rain")
        assert told(found) == told(expected)
        text = mlx_lm.generate(*loaded, "the rain", max_tokens=MAX_TOKENS)
        assert text == "".join(r.text for r in expected)
        prompts = [loaded[1].encode(text) for text in ("the rain", "rain")]
        batch = mlx_lm.batch_generate(*loaded, prompts, max_tokens=5)
        assert len(batch.texts) == 2

    def test_mlx_lms_own_speculative_decoding(self, other_folder, hooked_names):
        loaded = mlx_lm.load(other_folder)
        draft_model, _ = mlx_lm.load(other_folder)
        expected, found = both(loaded, loaded, "the", draft_model=draft_model)
        assert told(found) == told(expected)
        assert any(r.from_draft for r in found)

    def test_a_drafter_named_for_one_is_a_mistake(
        self, other_folder, folder, hooked_names
    ):
        with pytest.raises(PairingError, match="must be a Gemma 4 model of mlx-lm"):
            mlx_lm.load(other_folder, draft_model=folder / "drafter")
        install(draft_model=folder / "drafter")  # for Gemma 4, if one is loaded
        assert not carries_drafter(mlx_lm.load(other_folder)[0])

    def test_batches_are_mlx_lms(self, other_folder, hooked_names):
        model, _ = mlx_lm.load(other_folder)
        for make in (
            generation.BatchGenerator,
            type("Sub", (generation.BatchGenerator,), {}),
        ):
            batch = make(model, max_tokens=3)
            assert isinstance(batch, state().own.BatchGenerator)
            assert isinstance(batch, generation.BatchGenerator)
            batch.close()


def imported_by_value():
    """Every module of mlx-lm with the names that it imports by value and replaces."""
    package = Path(mlx_lm.__file__).parent
    names = {row.name for row in hook_table.REPLACED}
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        parts = ["mlx_lm", *path.relative_to(package).with_suffix("").parts]
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        for node in tree.body:  # at the top: inside functions it is fetched anew
            if isinstance(node, ast.ImportFrom):
                is_own = node.level or (node.module or "").split(".")[0] == "mlx_lm"
                source = (node.module or "").split(".")[-1]
                if is_own and source in ("", "utils", "generate", "mlx_lm"):
                    for alias in node.names:
                        if alias.name in names:
                            assert alias.asname is None, path
                            yield ".".join(parts), alias.name


class TestNames:
    def test_the_table_has_every_copy(self):
        listed = {
            (module, row.name) for row in hook_table.REPLACED for module in row.copies
        }
        assert set(imported_by_value()) == listed | {("mlx_lm.convert", "load")}

    def test_all_are_replaced_and_restored(self):
        for name in (
            "benchmark",
            "cache_prompt",
            "chat",
            "fuse",
            "perplexity",
            "server",
        ):
            importlib.import_module(f"mlx_lm.{name}")
        before = current()
        assert len(before) > 14
        install()
        try:
            during = current()
        finally:
            uninstall()
        assert all(during[place] is not before[place] for place in before)
        for (_, name), value in during.items():
            assert value is state().replacements[name]
        assert current() == before

    def test_copies_taken_since_are_restored(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "mlx_lm.perplexity", raising=False)
        install()
        try:
            module = importlib.import_module("mlx_lm.perplexity")
            assert module.load is mlx_lm.utils.load is not own("load")
        finally:
            uninstall()
        assert module.load is own("load")

    def test_copies_outside_mlx_lm_follow(self, folder):
        install()
        load = mlx_lm.load
        uninstall()
        model, _ = load(str(folder))
        assert not carries_drafter(model)
        with pytest.raises(TypeError, match="speculative_decoding"):
            load(str(folder), speculative_decoding=True)
        install()
        try:
            assert carries_drafter(load(str(folder))[0])
        finally:
            uninstall()

    def test_somebody_elses_function_stays(self, monkeypatch):
        chat: Any = importlib.import_module("mlx_lm.chat")
        monkeypatch.setattr(chat, "load", len)
        install()
        assert chat.load is len
        assert chat.stream_generate is generation.stream_generate
        chat.stream_generate = max
        uninstall()
        assert (chat.load, chat.stream_generate) == (len, max)
        chat.stream_generate = own("stream_generate")

    def test_twice_is_once(self):
        before = current()
        install()
        during = current()
        install(speculative_decoding=False)
        assert current() == during
        assert not state().settings.speculative_decoding
        uninstall()
        assert current() == before
        uninstall()
        assert current() == before

    def test_many_threads(self):
        before = current()
        barrier = threading.Barrier(8)

        def work():
            barrier.wait()
            for _ in range(50):
                install()
                uninstall()

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert current() == before
        assert not state().is_on

    def test_the_hook_is_nothing_until_it_is_installed(self):
        before = current()
        assert mlx_gemma_mtp.install is install
        assert mlx_gemma_mtp.uninstall is uninstall
        assert current() == before


class TestOtherVersions:
    @pytest.fixture(autouse=True)
    def _nothing_changes(self):
        before = current()
        yield
        assert current() == before

    @pytest.mark.parametrize(
        ("name", "function", "got"),
        [
            ("generate_step", lambda prompt, model: None, r"got \(prompt, model\) in"),
            ("stream_generate", lambda *args: None, r"got \(\*args\) in"),
        ],
    )
    def test_a_changed_signature_is_named(self, monkeypatch, name, function, got):
        monkeypatch.setattr(generation, name, function)
        before = current()
        with pytest.raises(HookError, match=got) as caught:
            install()
        assert str(caught.value).startswith(
            f"mlx_lm.generate.{name} must be called as ("
        )
        assert "\n" not in str(caught.value)
        assert current() == before
        monkeypatch.undo()

    def test_a_changed_default_is_named(self, monkeypatch):
        def load(
            path_or_hf_repo,
            tokenizer_config=None,
            model_config=None,
            adapter_path=None,
            lazy=True,
            return_config=False,
            revision=None,
            trust_remote_code=False,
        ):
            raise AssertionError

        monkeypatch.setattr(mlx_lm.utils, "load", load)
        with pytest.raises(HookError, match="lazy=True"):
            install()
        monkeypatch.undo()

    def test_a_missing_name_is_named(self, monkeypatch):
        monkeypatch.delattr(generation.BatchGenerator, "extract_cache")
        with pytest.raises(
            HookError, match=r"BatchGenerator.extract_cache must.*no such"
        ):
            install()

    def test_one_that_is_too_old(self, monkeypatch):
        monkeypatch.setattr(hook, "__version__", "0.31.3")
        with pytest.raises(
            HookError, match=r"needs mlx-lm 0\.32 or newer: got 0\.31\.3"
        ):
            install()

    @pytest.mark.parametrize("version", ["0.32.0", "0.32.2.dev1", "0.33.0", "1.0"])
    def test_newer_ones_are_held_against_the_table(self, monkeypatch, version):
        monkeypatch.setattr(hook, "__version__", version)
        install()
        uninstall()


@pytest.mark.gemma
def test_ids_of_a_text_stay_mlx_lms(gemma_pair_folder, hooked_names, monkeypatch):
    """Gemma's own tokenizer puts no <bos> in front, and mlx-lm's programs know it."""
    model, tokenizer = mlx_lm.load(str(gemma_pair_folder("may-12b")))
    prompts = let_say(monkeypatch, tokenizer, "a<turn|>")
    list(generation.stream_generate(model, tokenizer, "Why", max_tokens=1))
    assert prompts == [list(tokenizer.encode("Why"))]
    assert tokenizer.bos_token_id not in prompts[0]
