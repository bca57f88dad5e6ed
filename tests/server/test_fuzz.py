"""Bodies of every kind: none may make the server fail.

Fields are those of the OpenAPI description that the server gives of itself.

Run: python -m pytest tests/server/test_fuzz.py
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from mlx_gemma_mtp.server.json_body import UNREADABLE
from mlx_gemma_mtp.server.messages.schema import MessagesBody
from mlx_gemma_mtp.server.responses_api.schema import ResponsesBody
from mlx_gemma_mtp.server.schema import ChatBody, CompletionBody
from tests.server.serving import (
    CHAT_TEMPLATE,
    Client,
    ScriptedDecoder,
    echo,
    running_command,
    scripted_means,
    scripted_server,
)

PATHS: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/messages": MessagesBody,
    "/v1/responses": ResponsesBody,
}
NEEDED = {
    "/v1/completions": ("prompt",),
    "/v1/messages": ("messages", "max_tokens"),
    "/v1/responses": ("input",),
}

numbers = st.one_of(
    st.integers(-3, 12),
    st.integers(),
    st.floats(),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 1e308, 0.1, 0.5, 1.0]),
)
texts = st.one_of(
    st.text(max_size=8), st.sampled_from(["", "a", "auto", "none", "text"])
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)
    ),
    max_leaves=6,
)
parts = st.lists(
    st.one_of(
        st.fixed_dictionaries({"type": st.just("text"), "text": texts}),
        st.fixed_dictionaries({"type": st.just("refusal"), "refusal": texts}),
        st.fixed_dictionaries({"type": anything}, optional={"text": texts}),
    ),
    max_size=2,
)
calls = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": texts, "arguments": anything})}
    ),
    max_size=2,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "x", ""])},
        optional={
            "content": st.one_of(texts, parts, anything),
            "tool_calls": st.one_of(calls, anything),
            "name": anything,
        },
    ),
    max_size=4,
)
token_ids = st.lists(st.integers(0, 1023), max_size=5)
# What a field may well be; anything else is tried as well.
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.one_of(
        texts, token_ids, st.lists(texts, max_size=3), st.lists(token_ids, max_size=3)
    ),
    "messages": messages,
    "model": st.sampled_from(["embedded", "default_model", "other", ""]),
    "max_tokens": st.integers(1, 6),
    "max_completion_tokens": st.integers(1, 6),
    "min_tokens": st.integers(0, 3),
    "stop_token_ids": token_ids,
    "cache_salt": texts,
    "n": st.integers(1, 3),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "stop": st.one_of(texts, st.lists(texts, max_size=3)),
    "logprobs": st.one_of(st.booleans(), st.integers(0, 25)),
    "top_logprobs": st.integers(0, 25),
    "logit_bias": st.dictionaries(
        st.integers(-1, 1025).map(str), st.floats(-2000, 2000), max_size=3
    ),
    "speculative": st.fixed_dictionaries(
        {"num_draft_tokens": st.one_of(st.integers(-1, 9), st.just("auto"))}
    ),
    "seed": st.integers(-(2**63), 2**64),
    "tools": st.lists(
        st.fixed_dictionaries(
            {
                "type": st.just("function"),
                "function": st.fixed_dictionaries(
                    {"name": texts}, optional={"parameters": anything}
                ),
            }
        ),
        max_size=2,
    ),
    "tool_choice": st.sampled_from(["auto", "none", "required"]),
    "response_format": st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "json_object", "json_schema", ""])},
        optional={
            "json_schema": st.fixed_dictionaries(
                {"schema": st.one_of(anything, st.just({"type": "integer"}))},
                optional={"strict": st.booleans(), "name": texts},
            )
        },
    ),
    "structured_outputs": st.dictionaries(
        st.sampled_from(["json", "regex", "choice", "grammar", "json_object"]),
        st.one_of(texts, st.booleans(), st.lists(texts, max_size=2), anything),
        max_size=2,
    ),
    "chat_template_kwargs": st.dictionaries(
        st.sampled_from(["a", "enable_thinking", "tokenize", "messages"]), anything
    ),
    "best_of": st.integers(1, 3),
}


def typed(*kinds: str, **fields: Any) -> st.SearchStrategy[Any]:
    """Objects that say what they are, with fields that may be missing."""
    named = {"type": st.sampled_from(kinds)}
    return st.fixed_dictionaries(named, optional=fields)


def said(role: Any, *contents: Any, **fields: Any) -> st.SearchStrategy[Any]:
    """Messages of a role, or of any."""
    content = st.one_of(texts, st.lists(st.one_of(*contents), max_size=3), anything)
    return st.fixed_dictionaries({"role": role, "content": content, **fields})


schemas = st.one_of(anything, st.just({"type": "integer"}))
text_blocks = typed("text", text=texts)
blocks = (
    text_blocks,
    typed("thinking", thinking=texts, signature=texts),
    typed("redacted_thinking", "image", "document", "x", data=texts),
    typed("tool_use", id=texts, name=texts, input=anything),
    typed(
        "tool_result",
        tool_use_id=texts,
        content=st.one_of(texts, st.lists(text_blocks, max_size=2), anything),
        is_error=st.booleans(),
    ),
)
roles = st.sampled_from(["user", "assistant", "system", "developer", "tool"])
contents = typed("input_text", "output_text", "refusal", "input_image", text=texts)
items = st.one_of(
    said(roles, contents),
    said(roles, contents, type=st.just("message")),
    typed("function_call", call_id=texts, name=texts, arguments=texts),
    typed("custom_tool_call", call_id=texts, name=texts, input=texts),
    typed("function_call_output", call_id=texts, output=st.one_of(texts, anything)),
    typed(
        "reasoning",
        summary=st.lists(typed("summary_text", text=texts), max_size=2),
        content=st.lists(typed("reasoning_text", text=texts), max_size=2),
        encrypted_content=st.one_of(texts, texts.map("plain:{}".format)),
    ),
    typed("item_reference", "x", id=texts),
)
choices = st.one_of(
    st.sampled_from(["auto", "none", "required"]),
    typed("auto", "any", "none", "tool", "function", "custom", name=texts),
)
# The same where a path has fields of its own.
LIKELY_IN: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "/v1/messages": {
        "messages": st.lists(said(roles, *blocks), max_size=4),
        "system": st.one_of(texts, st.lists(text_blocks, max_size=2)),
        "tools": st.lists(typed("custom", "x", name=texts, input_schema=schemas)),
        "tool_choice": choices,
        "thinking": typed("enabled", "disabled", "adaptive", budget_tokens=numbers),
        "output_config": st.fixed_dictionaries(
            {},
            optional={"effort": texts, "format": typed("json_schema", schema=schemas)},
        ),
        "output_format": typed("json_schema", "x", schema=schemas),
        "stop_sequences": st.lists(texts, max_size=3),
    },
    "/v1/responses": {
        "input": st.one_of(texts, st.lists(items, max_size=5)),
        "instructions": texts,
        "tools": st.lists(
            st.one_of(
                typed("function", "custom", "web_search", name=texts),
                typed("namespace", name=texts, tools=anything),
            ),
            max_size=2,
        ),
        "tool_choice": choices,
        "text": st.fixed_dictionaries(
            {},
            optional={
                "format": typed("text", "json_object", "json_schema", schema=schemas),
                "verbosity": texts,
            },
        ),
        "reasoning": st.fixed_dictionaries(
            {}, optional={"effort": texts, "summary": texts}
        ),
        "max_output_tokens": st.integers(1, 6),
        "include": st.lists(texts, max_size=2),
        "metadata": st.dictionaries(texts, texts, max_size=2),
        "user": texts,
    },
}


def bodies(path: str) -> st.SearchStrategy[Any]:
    """Bodies for a path: most of them nearly right."""
    fields = sorted(PATHS[path].model_fields)
    needed = NEEDED.get(path, ("messages",))
    known = {**LIKELY, **LIKELY_IN.get(path, {})}
    values = {
        name: known.get(name, st.one_of(st.none(), st.booleans(), numbers))
        for name in fields
    }
    least = {name: values[name] for name in needed}
    likely = st.fixed_dictionaries(
        least,
        optional={name: values[name] for name in fields if name not in needed},
    )
    spoilt = st.tuples(likely, st.sampled_from(fields), anything).map(
        lambda drawn: {**drawn[0], drawn[1]: drawn[2]}
    )
    few = st.fixed_dictionaries(
        least,
        optional={
            name: values[name]
            for name in ("max_tokens", "stream", "n", "stop", "system", "instructions")
            if name in values and name not in needed
        },
    )
    return st.one_of(few, likely, spoilt, anything)


def check(client: Client, path: str, raw: bytes) -> int:
    """Send a body; the answer must be one, whatever it says."""
    response = client.ask("POST", path, raw)
    assert response.status in (200, 400, 404, 429), (response.status, response.body)
    if response.status != 200:
        assert response.message
        assert response.message.count("\n") == 0
    elif path not in ("/v1/completions", "/v1/chat/completions"):
        is_stream = "event-stream" in response.headers["content-type"]
        assert response.named_events if is_stream else response.json()
    elif response.headers["content-type"].startswith("text/event-stream"):
        for event in response.events:
            assert event["choices"] or event["usage"]
    else:
        assert response.json()["choices"]
    return response.status


def dump(body: Any) -> bytes:
    return json.dumps(body).encode()


@pytest.fixture(scope="module")
def client():
    means = scripted_means(ScriptedDecoder(echo))
    with scripted_server(means, "--max-tokens", "4") as (client, _):
        yield client


@pytest.mark.parametrize("path", sorted(PATHS))
def test_the_description_names_these_fields(client, path):
    found = client.get("/openapi.json").json()
    schema = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    name = schema["schema"]["$ref"].rsplit("/", 1)[-1]
    described = found["components"]["schemas"][name]
    obeyed, properties = set(PATHS[path].model_fields), described["properties"]
    for name in set(properties) - obeyed:
        assert properties[name]["description"].startswith("Refused: ")
    assert obeyed <= set(properties)


@pytest.mark.parametrize("path", sorted(PATHS))
def test_bodies_of_every_kind(client, path):
    statuses = []

    @settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])
    @given(bodies(path))
    def ask(body):
        statuses.append(check(client, path, dump(body)))

    ask()
    # Not all were refused, or nothing would have been tried.
    assert statuses.count(200) > 10
    assert statuses.count(400) > 10
    assert client.get("/health").json() == {"status": "ok"}


@settings(max_examples=150)
@given(
    raw=st.one_of(
        st.binary(max_size=60),
        st.text(max_size=60).map(str.encode),
        # JSON with something else in one place.
        st.tuples(st.integers(0, 40), st.binary(max_size=3)).map(
            lambda drawn: b"".join(
                [
                    (whole := b'{"prompt": "a b", "max_tokens": 3, "n": 1}')[
                        : drawn[0]
                    ],
                    drawn[1],
                    whole[drawn[0] + 1 :],
                ]
            )
        ),
    )
)
def test_bytes_of_every_kind(client, raw):
    check(client, "/v1/completions", raw)


def overlong(code: int, size: int) -> bytes:
    """A code point in more bytes than it needs, which UTF-8 forbids."""
    rest = [0x80 | (code >> 6 * i) & 0x3F for i in reversed(range(size - 1))]
    return bytes([(0xF00 >> size) & 0xFF | code >> 6 * (size - 1), *rest])


surrogates = st.integers(0xD800, 0xDFFF).map(chr)
characters = st.characters(codec="utf-8", exclude_characters='"\\')
# Every way in which bytes are no UTF-8: see table 3-7 of the Unicode standard.
NO_UTF8: dict[str, st.SearchStrategy[bytes]] = {
    "surrogates": surrogates.map(lambda c: c.encode("utf-8", "surrogatepass")),
    "pairs": st.tuples(st.integers(0xD800, 0xDBFF), st.integers(0xDC00, 0xDFFF)).map(
        lambda halves: "".join(map(chr, halves)).encode("utf-8", "surrogatepass")
    ),
    "overlong": st.one_of(
        st.integers(0, 0x7F).map(lambda code: overlong(code, 2)),
        st.integers(0, 0x7FF).map(lambda code: overlong(code, 3)),
        st.integers(0, 0xFFFF).map(lambda code: overlong(code, 4)),
    ),
    "truncated": characters.filter(lambda c: ord(c) > 0x7F).map(
        lambda c: c.encode()[:-1]
    ),
    "continuations": st.binary(min_size=1, max_size=3).map(
        lambda raw: bytes(0x80 | byte & 0x3F for byte in raw)
    ),
    "too_large": st.integers(0x110000, 0x1FFFFF).map(lambda code: overlong(code, 4)),
    "no_bytes": st.sampled_from([bytes([byte]) for byte in range(0xF5, 0x100)]),
    "latin_1": st.integers(0xC0, 0xFF).map(lambda code: bytes([code])),
}
# The encodings that JSON once had, with a mark before the text and without.
OTHERS = [
    (mark, encoding)
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
    for mark in ("", "\ufeff")
]


def refused_as_unreadable(client: Client, raw: bytes) -> None:
    for path in PATHS:
        response = client.ask("POST", path, raw)
        assert (response.status, response.message) == (400, UNREADABLE)


@pytest.mark.parametrize("kind", sorted(NO_UTF8))
def test_bytes_that_are_no_text(client, kind):
    @settings(max_examples=25, deadline=None)
    @given(texts, NO_UTF8[kind], texts)
    def ask(before, wrong, after):
        start, end = (json.dumps(text)[1:-1].encode() for text in (before, after))
        raw = b'{"prompt": "%s%s%s", "messages": []}' % (start, wrong, end)
        with pytest.raises(UnicodeDecodeError):
            raw.decode()
        refused_as_unreadable(client, raw)

    ask()
    assert client.get("/health").status == 200


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(OTHERS),
    st.text(st.one_of(characters, surrogates), max_size=8),
    st.integers(0, 3),
)
def test_other_encodings(client, form, text, num_missing):
    mark, encoding = form
    body = mark + json.dumps({"prompt": text, "messages": []}, ensure_ascii=False)
    raw = body.encode(encoding, "surrogatepass")
    refused_as_unreadable(client, raw[: len(raw) - num_missing])


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(PATHS))
def test_bodies_of_every_kind_for_the_real_engine(path):
    arguments = ("--max-tokens", "4", "--chat-template", CHAT_TEMPLATE)
    with running_command(*arguments) as (client, process):

        @settings(max_examples=1500, suppress_health_check=list(HealthCheck))
        @given(bodies(path))
        def ask(body):
            check(client, path, dump(body))

        ask()
        assert client.get("/health").json() == {"status": "ok"}
        assert client.text("def area(radius):\n", max_tokens=8)
        assert process.poll() is None
