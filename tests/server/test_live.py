"""The server as it is run: the command in a process, with the embedded pair.

Run: python -m pytest tests/server/test_live.py
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from mlx_gemma_mtp import embedded_pair_path, load, stream_generate
from mlx_gemma_mtp.generation.encoding import encode_text
from mlx_gemma_mtp.server.arguments import API_KEY_VARIABLE
from tests.server.serving import (
    CHAT_TEMPLATE,
    ROOT,
    WAIT_S,
    running_command,
    wait_until,
)
from tests.tiny import uncompiled

PROMPT = "def area(radius):\n"


@pytest.fixture(scope="module")
def client():
    # Drafts of a number that no clock chooses, but for requests that limit it.
    settings = ("--chat-template", CHAT_TEMPLATE, "--num-draft-tokens", "4")
    with pytest.MonkeyPatch.context() as patch:
        # Every mixture of requests would be compiled anew. The servers below compile.
        patch.setenv("MLX_DISABLE_COMPILE", "1")
        with running_command(*settings) as (client, _):
            yield client


@pytest.fixture(scope="module")
def model():
    """The same model here, to compare with."""
    with uncompiled():
        yield load(embedded_pair_path())


def generated(model, prompt=PROMPT, **settings):
    """The responses of ``stream_generate``."""
    with uncompiled():
        target, tokenizer = model
        return list(
            stream_generate(target, tokenizer, prompt, exactness="fast", **settings)
        )


def text_of(responses):
    return "".join(response.text for response in responses)


def together(*asks):
    """Ask for several things at once."""
    with ThreadPoolExecutor(len(asks)) as threads:
        return [future.result() for future in [threads.submit(ask) for ask in asks]]


def test_greedy_text_is_that_of_stream_generate(client, model):
    expected = text_of(generated(model, max_tokens=16))
    for drafts in (0, 3, "auto"):
        speculative = {"num_draft_tokens": drafts}
        body = client.complete(PROMPT, max_tokens=16, speculative=speculative).json()
        assert body["choices"][0]["text"] == expected
        assert (body["speculative"]["drafted"] > 0) == (drafts != 0)
    chunks = client.stream(PROMPT, max_tokens=16)[:-1]
    assert "".join(c["choices"][0]["text"] for c in chunks) == expected


def mlx_lms_text(target, tokenizer, *, stops, min_tokens):
    """mlx-lm's own plain decoding, in which no end comes before so many tokens."""
    prompt = mx.array(encode_text(tokenizer, PROMPT))
    banned = mx.array(sorted({*stops, *tokenizer.eos_token_ids}))

    places = itertools.count()

    def processor(_, logits):
        is_early = next(places) < min_tokens
        return logits.at[:, banned].add(-mx.inf) if is_early else logits

    found = []
    with uncompiled():
        for token, _ in generate_step(
            prompt, target, max_tokens=24, logits_processors=[processor]
        ):
            if token in stops:
                break
            found.append(token)
    return tokenizer.decode(found), len(found) + 1


@pytest.mark.parametrize("min_tokens", [0, 8])
def test_no_end_comes_before_so_many_tokens(client, model, min_tokens):
    """Not even a token that would stand at the place 7 of the text."""
    stop = 311
    text, count = mlx_lms_text(*model, stops={stop}, min_tokens=min_tokens)
    fields = {"min_tokens": min_tokens, "stop_token_ids": [stop], "max_tokens": 24}
    for drafts in (0, 3):
        body = client.complete(
            PROMPT, speculative={"num_draft_tokens": drafts}, logprobs=0, **fields
        ).json()
        (choice,) = body["choices"]
        assert choice["text"] == text
        # It is counted and reported, and no part of the text, as in vLLM.
        tokens = choice["logprobs"]["tokens"]
        assert len(tokens) == body["usage"]["completion_tokens"] == min(count, 24)
        is_stopped = count <= 24
        assert choice["finish_reason"] == ("stop" if is_stopped else "length")
        if is_stopped:
            assert tokens[-1] == model[1].decode([stop])


def test_a_seed_has_one_text_with_fewest_tokens_too(client):
    settings = {"temperature": 0.9, "seed": 5, "max_tokens": 14, "min_tokens": 9}
    texts = {
        client.text(
            PROMPT,
            speculative={"num_draft_tokens": drafts},
            stop_token_ids=list(range(300, 400)),
            **settings,
        )
        for drafts in (0, 3, 4)
    }
    assert len(texts) == 1


def test_stop_strings_count_behind_the_fewest_tokens(client):
    text = client.text(PROMPT, max_tokens=40)
    stop = " of area"
    (first, second) = [m.start() for m in re.finditer(stop, text)][:2]
    for min_tokens, end in ((26, first), (27, second)):
        (choice,) = client.complete(
            PROMPT, max_tokens=40, min_tokens=min_tokens, stop=stop, logprobs=0
        ).json()["choices"]
        assert choice["text"] == text[:end]
        assert choice["finish_reason"] == "stop"
        assert len(choice["logprobs"]["tokens"]) > min_tokens


def test_a_chat_is_its_templates_text(client, model):
    expected = text_of(generated(model, "# Be brief.\nimport ", max_tokens=12))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "import "},
    ]
    body = {"messages": messages, "max_tokens": 12}
    answer = client.ask("POST", "/v1/chat/completions", body).json()
    assert answer["choices"][0]["message"]["content"] == expected


def test_log_probabilities_are_those_of_stream_generate(client, model):
    responses = generated(model, max_tokens=16, num_logprobs=3)
    (choice,) = client.complete(PROMPT, max_tokens=16, logprobs=3).json()["choices"]
    found = choice["logprobs"]
    own = [response.token_logprob for response in responses]
    assert found["token_logprobs"] == pytest.approx(own, abs=1e-4)
    tokenizer = model[1]
    for response, top in zip(responses, found["top_logprobs"], strict=True):
        best = {tokenizer.decode([t]): value for t, value in response.top_logprobs}
        assert top == pytest.approx(best, abs=1e-4)


def test_a_seed_has_one_text_alone_and_in_company(client, model):
    settings = {"temperature": 0.9, "top_k": 50, "max_tokens": 12}
    alone = client.text(PROMPT, seed=5, **settings)
    expected = generated(model, max_tokens=12, temp=0.9, top_k=50, seed=5)
    assert alone == text_of(expected)
    asks = [
        lambda i=i: client.text(PROMPT if i % 2 else "import ", seed=5, **settings)
        for i in range(4)
    ]
    texts = together(*asks, lambda: client.text(PROMPT, max_tokens=16))
    assert texts[1:4:2] == [alone] * 2
    assert texts[0:4:2] == [texts[0]] * 2
    assert client.text(PROMPT, seed=6, **settings) != alone
    # Every choice has a text of its own, and the first one that of the seed.
    choices = client.complete(PROMPT, seed=5, n=2, **settings).json()["choices"]
    assert choices[0]["text"] == alone != choices[1]["text"]


def test_requests_of_every_kind_together(client):
    """What one request asks for changes nothing for another."""
    kinds = [
        {"max_tokens": 10},
        {"max_tokens": 6, "logprobs": 2},
        {"max_tokens": 10, "temperature": 1.0, "seed": 1},
        {"max_tokens": 9, "presence_penalty": 1.0},
        {"max_tokens": 9, "logit_bias": {"100": 50}},
        {"max_tokens": 24, "stop": "\n"},
        {"max_tokens": 10, "speculative": {"num_draft_tokens": 0}},
        {"max_tokens": 1},
    ]

    def ask(kind):
        body = client.complete(PROMPT, **kind).json()
        choice = body["choices"][0]
        return choice["text"], choice["finish_reason"], body["usage"]["total_tokens"]

    alone = [ask(kind) for kind in kinds]
    assert together(*(lambda k=kind: ask(k) for kind in kinds)) == alone
    assert alone[5][1] == "stop"
    assert len({text for text, *_ in alone}) >= 6


def test_short_prompts_of_eight_clients_at_once(client):
    """They are read together, while another one decodes: each has its own text."""
    kinds = [
        {
            "prompt": PROMPT + "    x = 1\n" * (i % 5) + f"    y = {i}",
            "max_tokens": 3,
            "temperature": i % 2,
            "seed": i,
        }
        for i in range(8)
    ]

    def ask(kind):
        body = client.complete(**kind).json()
        return body["choices"][0]["text"], body["usage"]

    def long():
        return client.text(PROMPT, max_tokens=12)

    found = together(long, *(lambda k=kind: ask(k) for kind in kinds))
    assert found == [long(), *(ask(kind) for kind in kinds)]
    assert len({text for text, _ in found[1:]}) > 3


def test_a_longer_prompt_is_taken_from_the_caches(client):
    prompt = PROMPT + "    # area of a circle\n" * 8
    first = client.complete(prompt, max_tokens=8).json()
    answer = first["choices"][0]["text"]
    second = client.complete(prompt + answer, max_tokens=8).json()
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 64
    fresh = client.complete(prompt, max_tokens=16).json()["choices"][0]["text"]
    assert fresh == answer + second["choices"][0]["text"]


def test_instructions_are_read_once(client, model):
    """Past the window of 32, where no cache can be cut shorter."""
    instructions = "Every word of a sentence has its place. " * 5
    texts = {}
    for question in ("import ", "def f(", "import "):
        messages = [
            {"role": "system", "content": instructions},
            {"role": "user", "content": question},
        ]
        body = {"messages": messages, "max_tokens": 10}
        answer = client.ask("POST", "/v1/chat/completions", body).json()
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        read = answer["usage"]["prompt_tokens"] - cached
        if question not in texts:
            prompt = f"# {instructions}\n{question}"
            texts[question] = text_of(generated(model, prompt, max_tokens=10))
        assert answer["choices"][0]["message"]["content"] == texts[question]
        if question == "def f(":
            assert 1 < read < 8
    assert read == 1  # the whole prompt had been there


def test_a_client_that_goes_away_leaves_the_others_alone(client):
    alone = client.text(PROMPT, max_tokens=16)

    def leave():
        connection = client.connect()
        body = {"prompt": PROMPT, "max_tokens": 900, "stream": True}
        client.send(connection, "POST", "/v1/completions", body)
        connection.getresponse().read1(10)
        connection.close()

    asks = [leave, leave, lambda: client.text(PROMPT, max_tokens=16), leave]
    assert together(*asks)[2] == alone
    wait_until(lambda: client.get("/stats").json()["live"] == 0)
    metrics = client.get("/metrics").body.decode()
    assert "mlx_gemma_mtp_live_requests 0.0" in metrics


def test_commands_of_the_docs(client):
    """The curl commands of its page, by another client."""
    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    commands = [s for s in page.splitlines() if s.startswith("curl ")]
    assert len(commands) >= 3
    for command in commands:
        _, *words = shlex.split(command)
        words = [word for word in words if word != "-N"]
        path = words[0].removeprefix("http://127.0.0.1:8080")
        body = None
        if words[1:]:
            header, kind, data, text = words[1:]
            assert (header, kind) == ("-H", "Content-Type: application/json")
            assert data == "-d"
            body = json.loads(text)
        response = client.ask("POST" if body else "GET", path, body)
        assert response.status == 200, command
        assert not (body or {}).get("stream") or response.events


def test_lengths_are_the_models(client):
    response = client.complete([2] * 1024)
    assert response.status == 400
    assert "at most 1024 tokens" in response.message


def test_the_clock_changes_no_text_and_the_time_to_finish_is_limited(model):
    expected = text_of(generated(model, max_tokens=16))
    with running_command("--shutdown-timeout", "0.2") as (client, process):
        for drafts in ("auto", 3):
            speculative = {"num_draft_tokens": drafts}
            text = client.text(PROMPT, max_tokens=16, speculative=speculative)
            assert text == expected
        connection = client.connect()
        body = {"prompt": PROMPT, "max_tokens": 1000}
        client.send(connection, "POST", "/v1/completions", body)
        wait_until(lambda: client.get("/stats").json()["live"] == 1)
        process.send_signal(signal.SIGINT)
        with closing(connection):
            answer = connection.getresponse()
            assert answer.status == 503
            assert "shutting down" in json.loads(answer.read())["error"]["message"]
        assert process.wait(WAIT_S) == 0


def test_settings_of_the_command_and_a_signal_lets_requests_finish(monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "sesame")
    config = json.dumps({"method": "mtp", "num_speculative_tokens": 2})
    arguments = ("--speculative-config", config, "--served-model-name", "tiny", "small")
    defaults = ("--temp", "0.7", "--max-tokens", "5", "--shutdown-timeout", "600")
    with running_command(*arguments, *defaults) as (client, process):
        assert client.get("/v1/models").status == 401
        client.key = "sesame"
        names = [m["id"] for m in client.get("/v1/models").json()["data"]]
        assert names == ["tiny", "small"]
        body = client.complete(PROMPT, model="small", seed=3).json()
        assert body["model"] == "small"
        assert body["usage"]["completion_tokens"] == 5
        assert body["speculative"]["rule"] == "coupled (seed)"
        rounds = client.get("/stats").json()["rounds_by_num_draft_tokens"]
        assert set(rounds) == {"2"}
        check_that_requests_finish(client, process)


def check_that_requests_finish(client, process):
    """Once a signal has come; new ones are refused."""
    body = {"prompt": PROMPT, "max_tokens": 60, "seed": 4}
    text = client.text(**body)
    connection = client.connect()
    client.send(connection, "POST", "/v1/completions", {**body, "stream": True})
    answer = connection.getresponse()
    start = answer.read1(10)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: client.get("/health").status == 503)
    assert client.complete(max_tokens=1).status == 503
    with closing(connection):
        lines = (start + answer.read()).split(b"\n\n")
    assert lines[-2:] == [b"data: [DONE]", b""]
    chunks = [json.loads(line.removeprefix(b"data: ")) for line in lines[:-2]]
    assert "".join(c["choices"][0]["text"] for c in chunks) == text
    assert process.wait(WAIT_S) == 0
