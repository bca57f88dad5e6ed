"""A pair of Gemma's ids says what a test has written, wherever it is asked.

Run: python -m pytest tests/test_gemma_pair.py
"""

import json

import pytest

import mlx_gemma_mtp
from mlx_gemma_mtp.cli import generate as cli
from tests.gemma import END_OF_TURN, VOCAB_SIZE
from tests.gemma_pair import let_say

pytestmark = [pytest.mark.gemma, pytest.mark.usefixtures("plain_graphs")]
ANSWER = "Hello 👩‍👩‍👧, 𓀀!\n\n    naïve"
QUESTION = "Why is the sky blue?"
PROMPT = f"<|turn>user\n{QUESTION}<turn|>\n<|turn>model\n"


@pytest.fixture(scope="module")
def folder(whole_gemma_pair_folder):
    return whole_gemma_pair_folder("may-e2b")


@pytest.fixture(scope="module")
def loaded(folder):
    return mlx_gemma_mtp.load(folder)


def test_the_pair_is_small_and_has_all_ids(folder, loaded):
    model, tokenizer = loaded
    assert model.args.vocab_size == VOCAB_SIZE == len(tokenizer)
    weights = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    assert len(weights) == 2
    assert sum(path.stat().st_size for path in weights) < 80e6
    assert tokenizer.eos_token_ids == {1, 50, END_OF_TURN}


@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_text_is_the_answer(monkeypatch, loaded, num_draft_tokens):
    model, tokenizer = loaded
    prompts = let_say(monkeypatch, tokenizer, f"{ANSWER}<turn|>", "Two.<turn|>")
    for expected in (ANSWER, "Two.", "Two."):
        settings = {"num_draft_tokens": num_draft_tokens, "temp": 1.0}
        text = mlx_gemma_mtp.generate(model, tokenizer, PROMPT, **settings)
        assert text == expected
    assert [tokenizer.decode(ids) for ids in prompts] == [f"<bos>{PROMPT}"] * 3


def test_the_command_says_the_answer(monkeypatch, folder, loaded, capsys):
    prompts = let_say(monkeypatch, loaded[1], f"{ANSWER}<turn|>")
    settings = json.dumps({"enable_thinking": False})
    arguments = ["--model", str(folder), "--chat-template-config", settings]
    assert cli.main([*arguments, "-p", QUESTION]) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n"
    assert [loaded[1].decode(prompt) for prompt in prompts] == [f"<bos>{PROMPT}"]
