"""The pair that ships with the package: it loads, decodes, and its drafts are used.

Run: python -m pytest tests/pair/test_embedded.py
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.engine.decoder import Decoder, Request
from mlx_gemma_mtp.generation import text as text_module
from mlx_gemma_mtp.generation.tokens import draft_block, generate_tokens
from mlx_gemma_mtp.pair.load import embedded_pair_path, load, load_pair, load_tokenizer
from tests.tiny import uncompiled

HELD_OUT = Path(__file__).parents[2] / "scripts" / "data" / "heldout.jsonl.gz"


@pytest.fixture(scope="module")
def loaded():
    return load(embedded_pair_path())


@pytest.fixture(scope="module")
def pair():
    return load_pair()


@pytest.fixture(scope="module")
def prompts(loaded):
    """Stretches of 48 tokens of text that was never trained on."""
    _, tokenizer = loaded
    with gzip.open(HELD_OUT, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file][:24]
    tokens = [tokenizer.encode(text[3000:4000]) for text in texts if len(text) > 4000]
    return [t[:48] for t in tokens]


def test_fits_into_the_package():
    files = [p for p in embedded_pair_path().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 10_000_000


def test_has_every_mechanism_of_gemma_4(pair):
    args = pair.target.language_model.args
    assert args.attention_k_eq_v
    assert set(args.layer_types) == {"sliding_attention", "full_attention"}
    assert args.num_global_key_value_heads < args.num_key_value_heads
    assert args.sliding_window * 8 <= args.max_position_embeddings
    assert args.tie_word_embeddings
    assert args.final_logit_softcapping == 30.0
    assert pair.drafter.config.backbone_hidden_size == args.hidden_size


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"temp": 0.8, "top_k": 40, "seed": 5}, marks=pytest.mark.slow),
    ],
)
def test_text_does_not_depend_on_drafting(pair, prompts, settings):
    """bfloat16, across the wrap of the window, batch and single rows.

    Compiled below, and in tests/exactness in all ways that rounds are run.
    """

    def decode(prompt, num_draft_tokens):
        return list(
            generate_tokens(
                pair,
                prompt,
                max_tokens=32,
                num_draft_tokens=num_draft_tokens,
                eos_token_ids=(),
                **settings,
            )
        )

    with uncompiled():
        plain = [decode(prompt, 0) for prompt in prompts[:2]]
        assert decode(prompts[0], 4) == plain[0]
        rows = zip(*decode(prompts[:2], 4), strict=True)
        assert [list(row) for row in rows] == plain


def test_drafts_are_used(pair, prompts):
    """A small sample; scripts/bench.py measures properly. Greedy, so it repeats."""
    requests = [Request(prompt, 24) for prompt in prompts[:8]]
    decoder = Decoder(pair.rounds, requests, num_draft_tokens=4)
    with uncompiled():
        for _ in decoder.run():
            pass
    assert decoder.stats.acceptance_length > 2.0


def test_drafts_continue_held_out_text(pair, prompts):
    """Drafts after a text that the target did not write, against its greedy text."""
    lengths = []
    for prompt in prompts[:8]:
        with uncompiled():
            drafts = draft_block(pair, prompt, 4)
            greedy = list(
                generate_tokens(
                    pair, prompt, max_tokens=4, num_draft_tokens=0, eos_token_ids=()
                )
            )
        equal = [a == b for a, b in zip(drafts, greedy, strict=True)]
        lengths.append(equal.index(False) if False in equal else 4)
    assert 1 + sum(lengths) / len(lengths) > 1.5


def test_tokenizer_gives_back_any_text(loaded):
    _, tokenizer = loaded
    for text in (
        "def f(x):\n\treturn x  # two  spaces\n\n\n",
        "naïve 你好 🙂 \\x00 ~~~",
        "    indented\r\n",
        " leading and trailing ",
    ):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(tokens) == text


def test_text_streams(loaded):
    model, tokenizer = loaded
    prompt = "import os\n\n\ndef read("
    text = text_module.generate(
        model, tokenizer, prompt, max_tokens=40, num_draft_tokens=0
    )
    assert text.isprintable() or "\n" in text
    for num_draft_tokens in (None, 4):
        responses = list(
            text_module.stream_generate(
                model,
                tokenizer,
                prompt,
                max_tokens=40,
                num_draft_tokens=num_draft_tokens,
            )
        )
        assert "".join(r.text for r in responses) == text
    # The fixed number's: by itself it may rightly find plain rounds faster here.
    assert responses[-1].acceptance_length > 1
    assert any(r.from_draft for r in responses)


def test_the_card_tells_how_it_was_made():
    card = (embedded_pair_path() / "README.md").read_text(encoding="utf-8")
    for word in ("seed", "train_pair.py", "PSF", "minutes", "held-out", "acceptance"):
        assert word in card


@cache
def chat_tokenizer() -> Any:
    return load_tokenizer(embedded_pair_path())


class TestChatTemplate:
    """A conversation is one text that goes on."""

    @staticmethod
    def text(*contents, roles=("user", "assistant"), **arguments):
        messages = [
            {"role": roles[i % len(roles)], "content": content}
            for i, content in enumerate(contents)
        ]
        tokenizer = chat_tokenizer()
        return tokenizer.apply_chat_template(messages, tokenize=False, **arguments)

    @settings(max_examples=30, deadline=None)
    @given(st.text(min_size=1))
    def test_a_question_stays_as_it_is(self, question):
        text = self.text(question, add_generation_prompt=True)
        assert text == f"<bos>{question}"
        tokens = chat_tokenizer().encode(text, add_special_tokens=False)
        assert tokens == chat_tokenizer().encode(question)

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.text("a \n"), min_size=3, max_size=7))
    def test_a_turn_begins_with_the_one_before(self, contents):
        *before, answer, question = contents[: (len(contents) - 1) // 2 * 2 + 1]
        answered = self.text(*before, add_generation_prompt=True) + answer
        later = self.text(*before, answer, question, add_generation_prompt=True)
        ends_line = answered == "<bos>" or answered.endswith("\n")
        assert later == answered + ("" if ends_line else "\n") + question
        going_on = self.text(*before, answer + " ", continue_final_message=True)
        assert going_on == answered + " "
        assert self.text(*before, answer) == f"{answered}<eos>"

    def test_instructions_are_comments(self):
        roles = ("system", "user")
        text = self.text("Be brief.\nUse types. ", "x = ", roles=roles)
        assert text == "<bos># Be brief.\n# Use types.\nx = "

    def test_contents_of_other_clients(self):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert self.text(parts, None, "c", add_generation_prompt=True) == "<bos>ab\nc"
