"""Fields of requests: obeyed, refused with the reason, or without effect on the text.

Run: python -m pytest tests/server/test_fields.py
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import mlx_lm.server
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.cache.kept import KeptCaches
from mlx_gemma_mtp.engine.sequence import TokenSequence
from mlx_gemma_mtp.pair.load import embedded_pair_path, load_pair
from mlx_gemma_mtp.sampling.params import SamplingParams
from mlx_gemma_mtp.server.arguments import parse
from mlx_gemma_mtp.server.body_parser import BodyParser
from mlx_gemma_mtp.server.choice import Choice
from mlx_gemma_mtp.server.errors import AnswerError
from mlx_gemma_mtp.server.fields import MAX_TOLD
from mlx_gemma_mtp.server.prompts import MIN_TOKENS, Prompt
from mlx_gemma_mtp.server.schema import MEDIA, ChatBody, CompletionBody
from mlx_gemma_mtp.server.served_model import make_engine, request_of
from mlx_gemma_mtp.server.thinking import ThinkingLimits
from tests.server.serving import (
    EOS,
    VOCAB_SIZE,
    ScriptedCache,
    ScriptedDecoder,
    echo,
    scripted_means,
    scripted_server,
    tokenizer,
    tokens_of,
)
from tests.tiny import uncompiled

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BOTH = (CHAT, COMPLETIONS)


@pytest.fixture(scope="module")
def server():
    decoder = ScriptedDecoder(echo)
    kept = KeptCaches(max_size=10, max_bytes=10**9, min_tokens=MIN_TOKENS)
    with scripted_server(scripted_means(decoder, kept=kept)) as (client, _):
        yield client, decoder


@pytest.fixture
def client(server):
    return server[0]


@pytest.fixture(scope="module")
def pair():
    return load_pair(embedded_pair_path())


def ask(client, path, **fields):
    needed: dict[str, Any] = {"prompt": "a b"}
    if path == CHAT:
        needed = {"messages": [{"role": "user", "content": "a b"}]}
    return client.ask("POST", path, {"max_tokens": 2, **needed, **fields})


def echoed(text, count):
    """What the script answers."""
    return tokenizer().decode(echo([2, *tokens_of(text)])[:count])


# What each of these would change, and the values with which it changes nothing.
REFUSED: dict[str, tuple[Any, list[Any]]] = {
    "adapters": ("folder", []),
    "add_generation_prompt": (False, [True]),
    "allowed_token_ids": ([1], [[]]),
    "audio": ({"voice": "alloy", "format": "wav"}, []),
    "bad_words": (["x"], [[]]),
    "chat_template": ("{{ x }}", [""]),
    "documents": ([{"title": "a", "text": "b"}], [[]]),
    "early_stopping": (True, [False]),
    "ebnf": ("root ::= x", []),
    "enable_thinking": (False, []),
    "echo": (True, [False]),
    "function_call": ({"name": "f"}, ["none"]),
    "functions": ([{"name": "f"}], [[]]),
    "grammar": ("root ::= x", [""]),
    "guided_choice": (["a", "b"], [[]]),
    "guided_decoding_backend": ("xgrammar", []),
    "guided_grammar": ("root ::= x", [""]),
    "guided_json": ({}, []),  # any JSON
    "guided_json_object": (True, [False]),
    "guided_regex": ("a+", [""]),
    "guided_whitespace_pattern": (" ", []),
    "include_reasoning": (False, [True]),
    "include_stop_str_in_output": (True, [False]),
    "json_schema": ({}, []),
    "length_penalty": (2.0, [1, 1.0]),
    "logits_processors": (["x"], [[]]),
    "logprob_token_ids": ([1], [[]]),
    "modalities": (["text", "audio"], [["text"]]),
    "moderation": ({"model": "x"}, []),
    "prompt_embeds": ("AAAA", []),
    "prompt_logprobs": (0, []),
    "reasoning": ({"effort": "low"}, []),
    "regex": ("a+", []),
    "repetition_detection": ({"min_count": 3}, []),
    "return_prompt_text": (True, [False]),
    "return_token_ids": (True, [False]),
    "return_tokens_as_token_ids": (True, [False]),
    "role_mapping": ({"user": "U"}, []),
    "skip_special_tokens": (False, [True]),
    "structural_tag": ("x", []),
    "suffix": ("x", [""]),
    "thinking": ({"type": "disabled"}, []),
    "thinking_budget": (0, [-1]),
    "truncate_prompt_tokens": (5, []),
    "use_beam_search": (True, [False]),
    "verbosity": ("low", ["medium"]),
    "vllm_xargs": ({"x": 1}, [{}]),
    "watermarking": (True, [False]),
    "web_search_options": ({}, []),
}
WITHOUT_EFFECT: dict[str, Any] = {
    "draft_model": "x",
    "ec_transfer_params": {},
    "kv_transfer_params": {},
    "media_io_kwargs": {},
    "metadata": {"a": "b"},
    "mm_processor_kwargs": {},
    "num_draft_tokens": 3,
    "priority": 1,
    "prompt_cache_key": "x",
    "prompt_cache_options": {},
    "prompt_cache_retention": "24h",
    "request_id": "x",
    "return_mm_kwargs": True,
    "return_token_offsets": False,
    "routed_experts_prompt_start": 0,
    "safety_identifier": "x",
    "service_tier": "auto",
    "session_id": "x",
    "spaces_between_special_tokens": False,
    "store": False,
    "stream_interval": 1,
    "truncation_side": "left",
    "user": "x",
}


class TestRefused:
    @pytest.mark.parametrize("name", REFUSED)
    def test_with_the_reason(self, client, name):
        value, harmless = REFUSED[name]
        for path in BOTH:
            response = ask(client, path, **{name: value})
            assert response.status == 400
            assert response.json()["error"]["param"] == name
            assert re.fullmatch(rf"{name} must be left out: .+\w\.", response.message)
            for nothing in (None, *harmless):
                assert ask(client, path, **{name: nothing}).status == 200

    def test_a_switch_is_no_number(self, client):
        for value, status in ((1, 200), (1.0, 200), (True, 400), (2, 400)):
            response = ask(client, COMPLETIONS, length_penalty=value)
            assert response.status == status

    def test_marks_of_a_text_that_a_request_adds(self, client):
        """Conversations begin with one as they are, texts get one."""
        for path, usual in ((CHAT, False), (COMPLETIONS, True)):
            assert ask(client, path, add_special_tokens=usual).status == 200
            response = ask(client, path, add_special_tokens=not usual)
            assert "add_special_tokens must be left out" in response.message

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("chat_template_kwargs", {"enable_thinking": False}),
            ("messages", [{"role": "user", "content": "a"}]),
            ("reasoning_effort", "low"),
            ("tools", [{"type": "function", "function": {"name": "f"}}]),
            ("top_logprobs", 3),
        ],
    )
    def test_of_conversations_in_completions(self, client, name, value):
        assert name in ask(client, COMPLETIONS, **{name: value}).message
        assert ask(client, COMPLETIONS, **{name: None}).status == 200

    @pytest.mark.parametrize("name", ["function_call", "audio"])
    def test_in_messages(self, client, name):
        message: dict[str, Any] = {"role": "assistant", "content": "a"}
        message[name] = {"name": "f"}
        other = {"role": "user", "content": "b"}
        response = ask(client, CHAT, messages=[other, message, other])
        assert response.status == 400
        assert response.json()["error"]["param"] == f"messages.1.{name}"
        message[name] = None
        assert ask(client, CHAT, messages=[other, message, other]).status == 200


class TestAccepted:
    @pytest.mark.parametrize("name", WITHOUT_EFFECT)
    def test_without_a_word(self, client, caplog, name):
        for path in BOTH:
            assert ask(client, path, **{name: WITHOUT_EFFECT[name]}).status == 200
        assert not [r for r in caplog.records if r.levelname == "WARNING"]

    def test_every_field_of_mlx_lms_server_is_known(self, client, caplog):
        source = inspect.getsource(mlx_lm.server)
        names = set(re.findall(r'body\.get\(\s*"(\w+)"', source))
        assert len(names) > 20
        nothing: dict[str, Any] = dict.fromkeys(names - {"stream"})
        for path in BOTH:
            assert ask(client, path, **nothing).status == 200
        assert not [r for r in caplog.records if r.levelname == "WARNING"]


class TestUnknown:
    def test_each_is_told_once_and_not_too_many(self, caplog):
        with scripted_server(scripted_means(ScriptedDecoder(echo))) as (client, _):
            for path in (*BOTH, COMPLETIONS):
                assert ask(client, path, made_up={"x": 1}).status == 200
            (line,) = [m for m in caplog.messages if "made_up" in m]
            assert line == "requests have a field that means nothing here: 'made_up'"
            assert ask(client, CHAT, **{"a\nb" + "x" * 10**5: 1}).status == 200
            assert "'a\\nb" in caplog.messages[-1]
            assert len(caplog.messages[-1]) < 200
            caplog.clear()
            for start in (0, 100):
                many = {f"field_{start + i}": i for i in range(100)}
                assert ask(client, COMPLETIONS, **many).status == 200
            told = [m for m in caplog.messages if "'field_" in m]
            assert len(told) == MAX_TOLD - 2


class TestParts:
    @pytest.mark.parametrize("kind", MEDIA)
    def test_media_are_refused_in_plain_words(self, client, kind):
        parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {}}]
        for role in ("user", "tool"):
            response = ask(client, CHAT, messages=[{"role": role, "content": parts}])
            assert response.status == 400
            assert response.message == (
                f"messages.0.content.1: this server reads text only: got {MEDIA[kind]} "
                f"({kind}). Leave it out."
            )

    @pytest.mark.parametrize("kind", ["thumb", 5, None, []])
    def test_what_is_no_part_is_named(self, client, kind):
        parts = [{"type": kind, "text": "a"}]
        response = ask(client, CHAT, messages=[{"role": "user", "content": parts}])
        assert response.status == 400
        assert response.json()["error"]["param"].startswith("messages.0.content.0")

    def test_refusals_are_text(self, client):
        parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": " b"}]
        answer = client.chat(parts, max_tokens=5).json()["choices"][0]["message"]
        assert answer["content"] == echoed("a b", 5)
        message = ChatBody.model_validate(
            {"messages": [{"role": "assistant", "content": None, "refusal": "No."}]}
        ).messages[0]
        assert message.plain() == {"role": "assistant", "content": "No."}


def choices(longest_alone=2**20, longest_shared=2**20, *arguments):
    limits = parse(["--max-model-len", "1000", *arguments]).limits
    return BodyParser(
        limits,
        ["m"],
        ThinkingLimits(tokenizer(), VOCAB_SIZE),
        sampling={"temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
        special_tokens=(),
        vocab_size=VOCAB_SIZE,
        longest_alone=longest_alone,
        longest_shared=longest_shared,
    )


def limit_of(made, num_prompt=100, **fields):
    """The most tokens of a conversation's answer."""
    messages = [{"role": "user", "content": "a"}]
    body = ChatBody.model_validate({"messages": messages, **fields})
    (choice,) = made.of_chat(body, Prompt([2] * num_prompt))
    return choice.max_tokens


class TestMostTokens:
    @pytest.mark.parametrize(
        ("fields", "limit"),
        [
            ({}, 512),
            ({"max_tokens": 7}, 7),
            ({"max_tokens": 900}, 900),
            ({"max_tokens": 901}, 900),
            ({"max_tokens": 10**30}, 900),
            ({"max_tokens": -1}, 900),
            ({"max_tokens": None}, 900),
            ({"max_completion_tokens": None}, 900),
            ({"max_completion_tokens": 7, "max_tokens": 8}, 7),
            ({"max_completion_tokens": None, "max_tokens": 8}, 8),
            ({"max_completion_tokens": 7, "max_tokens": None}, 7),
            ({"max_completion_tokens": -1, "max_tokens": 8}, 900),
        ],
    )
    def test_cut_to_what_the_context_leaves(self, fields, limit):
        assert limit_of(choices(), **fields) == limit
        body = CompletionBody.model_validate({"prompt": "a", **fields})
        (choice,) = choices().of_completion(body, [Prompt([2] * 100)])
        assert choice.max_tokens == limit

    def test_a_prompt_that_leaves_no_room_is_refused(self):
        for fields in ({}, {"max_tokens": -1}, {"max_tokens": 1}):
            assert limit_of(choices(), 999, **fields) == 1
            with pytest.raises(AnswerError, match="at most 1000 tokens") as error:
                limit_of(choices(), 1000, **fields)
            assert error.value.code == "context_length_exceeded"

    def test_cut_to_what_memory_leaves(self):
        made = choices(800, 200)
        assert limit_of(made, max_tokens=-1) == 512  # as without a word
        assert limit_of(made, max_tokens=700) == 700
        assert limit_of(made, max_tokens=701) == 700
        assert limit_of(made, 600, max_tokens=None) == 200
        assert (
            limit_of(choices(800, 700), max_tokens=-1) == 600
        )  # leaves some to others
        with pytest.raises(AnswerError, match="at most 800 tokens: got 800"):
            limit_of(made, 800)

    def test_an_answer_that_is_cut_ends_by_its_length(self, client):
        for limit in (10**6, -1, None):
            body = ask(client, COMPLETIONS, prompt=[2] * 1000, max_tokens=limit).json()
            assert body["usage"]["completion_tokens"] == 24
            assert body["choices"][0]["finish_reason"] == "length"

    def test_several_without_a_limit_decode_together(self, pair):
        """However little memory there is: nobody waits for a limit of another's."""
        layout = pair.rounds.target.layout
        size = layout.num_bytes(4, 512)
        engine = make_engine(parse(["--max-kv-bytes", f"{size}"]), pair, tokenizer())
        assert layout.num_bytes(1, engine.longest_alone) <= size
        made = choices(engine.longest_alone, engine.longest_shared, "--max-tokens", "9")
        limit = limit_of(made, 5, max_tokens=-1)
        assert 9 < limit < limit_of(made, 5, max_tokens=10**9)
        decoder = engine.means.decoder
        with uncompiled():
            for _ in range(4):
                decoder.add(request_of(pair, Choice([2] * 5, limit), frozenset()))
            for _ in range(5):
                decoder.step()
        assert (decoder.num_live, decoder.num_waiting) == (4, 0)
        decoder.close()


class TestSalts:
    PROMPT = (2, *range(100, 100 + 2 * MIN_TOKENS))

    def cached(self, client, **fields):
        body = ask(client, COMPLETIONS, prompt=list(self.PROMPT), **fields).json()
        return body["usage"]["prompt_tokens_details"]["cached_tokens"]

    def test_nobody_learns_what_another_has_sent(self, client):
        assert self.cached(client) == 0
        assert self.cached(client) > 0
        for salt in ("ada", "bob", "2"):
            assert self.cached(client, cache_salt=salt) == 0
            assert self.cached(client, cache_salt=salt) > 0
        assert self.cached(client, cache_salt=None) > 0

    salts = st.sampled_from([None, "a", "b"])
    texts = st.lists(st.integers(0, 1), min_size=1, max_size=5)

    @given(st.lists(st.tuples(salts, texts), max_size=12), salts, texts)
    def test_what_is_found_was_kept_with_the_same_salt(self, entries, salt, text):
        kept = KeptCaches(max_size=20, max_bytes=10**9, min_tokens=MIN_TOKENS)
        start = [7] * MIN_TOKENS
        for own, tokens in entries:
            told = [*start, *tokens]
            cache = ScriptedCache([own, *told])
            kept.keep(told, [cache], kind="user", salt=own)
        caches, count = kept.find([*start, *text, 9], salt=salt)
        same = [t for own, t in entries if own == salt and text[: len(t)] == t]
        longest = max(map(len, same), default=None)
        if longest is None:
            assert (caches, count) == (None, 0)
        else:
            assert count == MIN_TOKENS + longest
            assert caches is not None
            assert caches[0].tokens == [salt, *start, *text[:longest]]

    def test_salts_are_forgotten_with_their_caches(self):
        kept = KeptCaches(max_size=2, max_bytes=10**9, min_tokens=MIN_TOKENS)
        for number in range(50):
            tokens = [number, *self.PROMPT]
            kept.keep(tokens, [ScriptedCache(tokens)], kind="user", salt=f"{number}")
        assert len(kept) == 2
        assert {entry.salt for entry in kept._entries} == {"48", "49"}


class TestEnds:
    """What the decoder is asked for; the texts are in test_server_live."""

    def request(self, pair, **fields):
        return request_of(pair, Choice([2, 5], 9, **fields), frozenset([EOS]))

    def test_tokens_that_end_a_text(self, pair):
        more = {"stop_token_ids": frozenset([7, 8])}
        assert self.request(pair).eos_token_ids == {EOS}
        assert self.request(pair, **more).eos_token_ids == {EOS, 7, 8}
        ignoring = self.request(pair, **more, ignores_eos=True)
        assert ignoring.eos_token_ids == {7, 8}
        assert self.request(pair, ignores_eos=True).eos_token_ids == frozenset()

    @pytest.mark.parametrize(
        ("asked", "allowed", "source", "num_drafts"),
        [
            ("auto", "auto", "auto", 8),
            ("lookup", "auto", "lookup", 8),
            ("auto", "drafter", "drafter", 8),
            ("drafter", "drafter", "drafter", 8),
            ("lookup", "drafter", "drafter", 0),
        ],
    )
    def test_sources_of_drafts(self, pair, asked, allowed, source, num_drafts):
        """A request has no drafts where the server does not let its source."""
        choice = Choice([2, 5], 9, draft_source=asked)
        request = request_of(pair, choice, frozenset(), allowed)
        assert request.draft_source == source
        assert request.max_draft_tokens == num_drafts

    def test_only_requests_that_need_it_are_decided_on_the_host(self, pair):
        assert not self.request(pair, stop_token_ids=frozenset([7])).is_host
        assert self.request(pair, min_tokens=1).is_host
        row = TokenSequence.of(self.request(pair, min_tokens=1))
        assert row.request.sampling == SamplingParams()

    def test_fields_reach_the_order(self):
        fields = {
            "min_tokens": 3,
            "stop_token_ids": [5, 5],
            "ignore_eos": True,
            "cache_salt": "x",
        }
        body = CompletionBody.model_validate({"prompt": "a", **fields})
        (choice,) = choices().of_completion(body, [Prompt([2])])
        assert choice.min_tokens == 3
        assert choice.stop_token_ids == {5}
        assert choice.ignores_eos
        assert choice.cache_salt == "x"
