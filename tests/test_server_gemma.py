"""The server of a pair of Gemma's ids, in this process, which says written answers.

Run: python -m pytest tests/test_server_gemma.py
"""

import pytest

from mlx_gemma_mtp.load import load_tokenizer
from tests.gemma_pair import let_say
from tests.serving import pair_server
from tests.tiny import uncompiled

pytestmark = pytest.mark.gemma


@pytest.fixture(scope="module", autouse=True)
def _uncompiled():
    with uncompiled():
        yield


@pytest.mark.parametrize("form", ["may-e2b", "july-12b"])
def test_the_server_says_the_answers(monkeypatch, gemma_pair_folder, form):
    folder = gemma_pair_folder(form)
    answers = ["Rayleigh scattering 🌈 𓀀.", "Dusk.\n\n  - red"]
    tokenizer = load_tokenizer(folder)
    prompts = let_say(monkeypatch, tokenizer, *(f"{text}<turn|>" for text in answers))
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    with pair_server(folder) as (client, _):
        for expected in answers:
            settings = {"chat_template_kwargs": {"enable_thinking": False}}
            body = {"messages": messages, **settings}
            choice = client.ask("POST", "/v1/chat/completions", body).json()["choices"][
                0
            ]
            assert choice["message"]["content"] == expected
            assert choice["finish_reason"] == "stop"
            messages.append({"role": "assistant", "content": expected})
            messages.append({"role": "user", "content": "And red?"})
    opening = "<|channel>thought\n<channel|>" if form == "july-12b" else ""
    assert tokenizer.decode(prompts[0]) == (
        f"<bos><|turn>user\nWhy is the sky blue?<turn|>\n<|turn>model\n{opening}"
    )
    assert tokenizer.decode(prompts[1]).endswith(f"<|turn>model\n{opening}")
