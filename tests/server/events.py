"""What a client makes of a stream's events, and what it may rely on."""

from __future__ import annotations

import json
from typing import Any


def blocks_of(events: list[Any]) -> list[Any]:
    """The blocks of Anthropic's events, as a client puts them together."""
    blocks: list[Any] = []
    is_open = False
    for event in events:
        if event["type"] == "content_block_start":
            assert not is_open
            assert event["index"] == len(blocks)
            blocks.append({**event["content_block"]})
            is_open, arguments = True, ""
        elif event["type"] == "content_block_delta":
            assert is_open
            assert event["index"] == len(blocks) - 1
            delta = dict(event["delta"])
            kind = delta.pop("type").removesuffix("_delta")
            ((name, value),) = delta.items()
            if kind == "input_json":
                arguments += value
                blocks[-1]["input"] = json.loads(arguments)
            else:
                assert name == kind
                blocks[-1][name] += value
        elif event["type"] == "content_block_stop":
            assert is_open
            assert event["index"] == len(blocks) - 1
            is_open = False
    assert not is_open
    return blocks


def response_of(events: list[Any]) -> Any:
    """The last response of OpenAI's events, which lead to it step by step."""
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    assert [e["type"] for e in events[:2]] == [
        "response.created",
        "response.in_progress",
    ]
    last = events[-1]["response"]
    items: list[Any] = []
    texts: list[str] = []
    for event in events[2:-1]:
        kind, index = event["type"], event["output_index"]
        if kind == "response.output_item.added":
            assert index == len(items)
            items.append(event["item"])
            texts.append("")
        else:
            assert index == len(items) - 1
        if kind == "response.output_item.done":
            assert event["item"]["id"] == items[-1]["id"]
            items[-1] = event["item"]
        elif kind != "response.output_item.added":
            assert event["item_id"] == items[-1]["id"]
        if kind.endswith(".delta"):
            texts[-1] += event["delta"]
        elif kind.endswith("_text.done"):
            assert event["text"] == texts[-1]
        elif kind.endswith("arguments.done"):
            assert event["arguments"] == texts[-1]
    assert items == last["output"]
    for item, text in zip(items, texts, strict=True):
        assert text == _text_of(item)
    return last


def _text_of(item: Any) -> str:
    """What an item says."""
    if item["type"] == "function_call":
        return str(item["arguments"])
    if item["type"] == "custom_tool_call":
        return str(item["input"])
    place = "summary" if item.get("summary") else "content"
    return "".join(part["text"] for part in item[place])
