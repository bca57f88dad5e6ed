"""What pairs write under a constraint: it parses, follows, ends, and K changes nothing.

Run: python -m pytest tests/structure/test_texts.py
"""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import mlx.core as mx
import pytest
from pydantic import BaseModel

from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.generation.text import generate, stream_generate
from mlx_gemma_mtp.pair.load import embedded_pair_path, load
from tests.gemma import END_OF_CHANNEL, EOS_IDS, START_OF_CHANNEL
from tests.structure.schemas import FEW, SCHEMAS
from tests.tiny import model_folder

pytestmark = pytest.mark.usefixtures("plain_graphs")

PROMPT = "x = "
MAX_TOKENS = 120
# Of the texts of a pair, how many have ended by then at least.
LEAST_ENDED = 0.8
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load(model_folder(tmp_path_factory.mktemp("structure") / "pair"))


@pytest.fixture(scope="module")
def embedded():
    return load(embedded_pair_path())


@pytest.fixture(scope="module")
def gemma(gemma_pair_folder, gemma_tokenizer):
    """The tokenizer that other tests have too: llguidance takes seconds to read one."""
    return load(gemma_pair_folder("july-e2b"))[0], gemma_tokenizer("july-e2b")


def written(pair, prompt=PROMPT, **settings):
    """The text of one request, and its last response."""
    model, tokenizer = pair
    settings = {"max_tokens": MAX_TOKENS, "temp": 1.0, **settings}
    responses = list(stream_generate(model, tokenizer, prompt, **settings))
    return "".join(r.text for r in responses), responses


def followed(pair, name, seed, counts=(4,)):
    """Write a schema's text for every K and judge it; whether it has ended."""
    schema = SCHEMAS[name]
    text, responses = written(pair, schema=schema, seed=seed, num_draft_tokens=0)
    for count in counts:
        again, _ = written(pair, schema=schema, seed=seed, num_draft_tokens=count)
        assert again == text
    return judged(schema, text, responses)


def judged(schema, text, responses):
    """Check a schema's text; whether it has ended."""
    has_ended = responses[-1].finish_reason == "stop"
    if has_ended:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        assert not re.search(r"\s", STRING.sub("", text))
    else:
        assert responses[-1].finish_reason == "length"
    return has_ended


class TestSchemas:
    def test_there_are_sixty(self):
        assert len(SCHEMAS) >= 60

    @pytest.mark.parametrize("name", FEW)
    def test_random_pair_follows(self, tiny, name):
        assert followed(tiny, name, seed=1)

    @pytest.mark.slow
    @pytest.mark.parametrize("pair", ["embedded", "gemma"])
    def test_all_are_followed(self, pair, request):
        loaded = request.getfixturevalue(pair)
        ended = [followed(loaded, name, 1, counts=(4, "auto")) for name in SCHEMAS]
        assert sum(ended) >= LEAST_ENDED * len(ended)

    @pytest.mark.parametrize("name", FEW[:2])
    def test_text_without_a_seed_follows(self, tiny, name):
        """Drafts are judged by block verification then."""
        schema = SCHEMAS[name]
        text, responses = written(tiny, schema=schema, num_draft_tokens=4)
        assert judged(schema, text, responses)
        assert responses[-1].rule == "block verification, masked"


class Answer(BaseModel):
    yes: bool
    count: int | None


class TestWays:
    """How a constraint is given, in Python."""

    def test_a_class_of_pydantic(self, tiny):
        text, _ = written(tiny, schema=Answer, seed=2)
        assert isinstance(Answer.model_validate_json(text), Answer)

    def test_text_of_a_schema(self, tiny):
        schema = SCHEMAS["told apart"]
        text, _ = written(tiny, schema=json.dumps(schema), seed=2)
        assert text == written(tiny, schema=schema, seed=2)[0]

    @pytest.mark.parametrize("num_draft_tokens", [0, 4])
    def test_regex(self, tiny, num_draft_tokens):
        asked = "[a-f]{2,4}-[0-9]{3}"
        for seed in range(4):
            text, _ = written(
                tiny, regex=asked, seed=seed, num_draft_tokens=num_draft_tokens
            )
            assert re.fullmatch(asked, text)

    def test_grammar(self, tiny):
        asked = 'start: "(" (start | "x") ")"'
        text, responses = written(tiny, grammar=asked, seed=5)
        depth = text.count("(")
        assert text == "(" * depth + "x" + ")" * depth
        assert responses[-1].finish_reason == "stop"

    def test_generate(self, tiny):
        model, tokenizer = tiny
        assert generate(model, tokenizer, PROMPT, schema={"const": 5}) == "5"

    def test_two_at_once_are_refused(self, tiny):
        with pytest.raises(RequestError, match="one given form: got schema and regex"):
            written(tiny, schema={}, regex="a")

    def test_a_text_without_an_end_is_refused(self, tiny):
        model, tokenizer = tiny
        ends = set(tokenizer.eos_token_ids)
        tokenizer.eos_token_ids = set()
        try:
            with pytest.raises(RequestError, match="must have a token that ends it"):
                written((model, tokenizer), regex="a")
        finally:
            tokenizer.eos_token_ids = ends


class TestText:
    def test_greedy_is_the_same_for_every_k(self, tiny):
        schema = SCHEMAS["told apart"]
        texts = {
            written(tiny, schema=schema, temp=0.0, num_draft_tokens=k)[0]
            for k in (0, 4)
        }
        assert len(texts) == 1
        jsonschema.validate(json.loads(texts.pop()), schema)

    def test_drafts_stand(self, embedded):
        asked = "(import os\\n|import sys\\n|import re\\n){1,8}"
        _, responses = written(
            embedded,
            "import os\n",
            regex=asked,
            temp=0.0,
            num_draft_tokens=4,
            exactness="fast",
        )
        stats = responses[-1].stats
        assert stats.accepted > 0
        assert responses[-1].rule == "greedy, masked"

    def test_ends_where_tokens_run_out(self, tiny):
        text, responses = written(tiny, regex="[a-z]{50}", max_tokens=5, seed=0)
        assert responses[-1].finish_reason == "length"
        assert re.fullmatch("[a-z]{5,}", text)

    def test_stop_strings_count(self, tiny):
        text, responses = written(tiny, regex="a{9}b", stop="b", seed=0)
        assert text == "a" * 9
        assert responses[-1].finish_reason == "stop"

    def test_log_probabilities_are_behind_the_mask(self, tiny):
        _, responses = written(tiny, regex="q|z", seed=0, num_logprobs=3)
        first = responses[0]
        assert len([p for _, p in first.top_logprobs if p > -1e9]) == 2
        assert responses[-1].token_logprob > -50

    def test_other_processors_come_first(self, tiny):
        """One that bans all ends does not keep a text from ending."""
        _, tokenizer = tiny
        ends = mx.array(sorted(tokenizer.eos_token_ids))

        def endless(tokens: mx.array, logits: mx.array) -> mx.array:
            logits[:, ends] = -mx.inf
            return logits

        text, responses = written(
            tiny, regex="a{3}", seed=0, logits_processors=[endless]
        )
        assert (text, responses[-1].finish_reason) == ("aaa", "stop")

    def test_processors_that_leave_nothing_are_named(self, tiny):
        def nothing(tokens: mx.array, logits: mx.array) -> mx.array:
            return mx.full(logits.shape, -mx.inf, logits.dtype)

        with pytest.raises(RequestError, match="must leave a token"):
            written(tiny, regex="a{3}", seed=0, logits_processors=[nothing])


THINKING = "<bos><|turn>system\n<|think|><turn|>\n<|turn>user\nx<turn|>\n<|turn>model\n"
SILENT = "<bos><|turn>user\nx<turn|>\n<|turn>model\n"


class TestThoughts:
    """Of the random pair: a thought is whatever it says."""

    def tokens(self, gemma, prompt, **settings) -> tuple[list[int], Any]:
        _, responses = written(gemma, prompt, **settings)
        return [r.token for r in responses], responses

    def test_answer_alone_where_nobody_asks(self, gemma):
        text, _ = written(gemma, SILENT, regex="[ab]{3}", seed=1)
        assert re.fullmatch("[ab]{3}", text)

    def test_an_open_thought_is_free(self, gemma):
        """It ends when a processor says so: the answer follows."""
        opened = f"{THINKING}<|channel>thought\n"

        def ending(tokens: mx.array, logits: mx.array) -> mx.array:
            if tokens.size == num_prompt + 5:
                logits[:, END_OF_CHANNEL] = 1e4
            return logits

        _, tokenizer = gemma
        num_prompt = len(tokenizer.encode(opened, add_special_tokens=False))
        found, responses = self.tokens(
            gemma,
            opened,
            regex="[ab]{3}",
            seed=1,
            logits_processors=[ending],
            num_draft_tokens=4,
        )
        assert found[5] == END_OF_CHANNEL
        assert not set(found[:5]) & {END_OF_CHANNEL, *EOS_IDS}
        answer = "".join(r.text for r in responses[6:])
        assert re.fullmatch("[ab]{3}", answer)
        assert found[-1] in EOS_IDS

    @pytest.mark.parametrize("opens", [True, False])
    def test_one_may_begin_where_the_prompt_asks(self, gemma, opens):
        def beginning(tokens: mx.array, logits: mx.array) -> mx.array:
            place = tokens.size - num_prompt
            logits[:, START_OF_CHANNEL] = 1e4 if opens and place == 0 else -1e4
            logits[:, END_OF_CHANNEL] = 1e4 if place == 3 else -1e4
            return logits

        num_prompt = len(gemma[1].encode(THINKING, add_special_tokens=False))
        found, responses = self.tokens(
            gemma, THINKING, regex="[ab]{3}", seed=1, logits_processors=[beginning]
        )
        assert (found[0] == START_OF_CHANNEL) == opens
        start = found.index(END_OF_CHANNEL) + 1 if opens else 0
        assert re.fullmatch("[ab]{3}", "".join(r.text for r in responses[start:]))
