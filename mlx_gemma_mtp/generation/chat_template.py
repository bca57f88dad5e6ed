"""Messages to tokens, by the chat template that a tokenizer brings.

Templates are programs of the checkpoint's makers: they refuse what they do not know,
in any way they like. Here that is a mistake of the user's, in one line.

Marks that stand in a message's text become control tokens, as in other engines: the
template's text is encoded as a whole.

A model says something first and calls tools then. Gemma's templates write a message's
calls first, and its text behind their results, where it ends the turn. Here such a text
stands before the calls, byte for byte, as the model has written it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..cache.beginning import num_common
from ..errors import RequestError
from ..markup.answer import (
    CALL_END,
    CALL_START,
    CONTENT,
    THOUGHT_END,
    THOUGHT_OPENING,
    THOUGHT_START,
    AnswerReader,
    marks_of,
)
from .encoding import encode_text

_QUERY = "<query>"  # stands in for a message; mlx-lm's word
THINKING = "enable_thinking"  # the templates' variable
DEFAULT_THINKING = True  # as mlx-lm has it
_REASONS = ("reasoning", "reasoning_content")  # what a message's thought is called
_RESPONSES = "tool_responses"
_MAX_REASON = 300
_ARGUMENT = "arguments"  # what a text is called that stands in place of arguments
_TEXT = "no-object"  # one that no template has
_PLACE = "\x02text\x03"  # a tool that nobody has: its call keeps a text's place
_PLACE_CALL = {
    "id": _PLACE,
    "type": "function",
    "function": {"name": _PLACE, "arguments": {}},
}
_WRITTEN_PLACE = f"{CALL_START}call:{_PLACE}{{}}{CALL_END}"


@dataclass(frozen=True)
class ChatPrompt:
    """A prompt that a chat template has made.

    Attributes:
        tokens: Token ids, the begin-of-sequence token first.
        opening: The end of its text, in which the answer's turn begins. It may open a
            thought, and holds the answer's beginning where that is given.
        num_stable: Tokens that the prompt of a later turn begins with too, if the
            template leaves the earlier ones as they are: those before the opening.
    """

    tokens: list[int]
    opening: str
    num_stable: int


def apply_chat_template(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    *,
    advice: str,
    continues_last: bool = False,
    is_begun: bool = False,
    check: Callable[[str], None] | None = None,
) -> ChatPrompt:
    """The prompt that messages make.

    Args:
        tokenizer: A tokenizer of mlx-lm's that has a chat template.
        messages: Roles and contents, oldest first.
        config: More arguments for the template.
        advice: What to do where the template refuses the messages, a sentence.
        continues_last: Whether the last message is the beginning of the answer.
        is_begun: Whether the model has read already what stands before the first
            message's content, which is left out then.
        check: Called with the text before it is encoded; may raise.

    Raises:
        RequestError: The template does not take these messages.
    """
    text, opening = _opened(tokenizer, messages, config, advice, continues_last)
    if is_begun:
        other = [{**messages[0], "content": _QUERY}, *messages[1:]]
        marked, _ = _opened(tokenizer, other, config, advice, continues_last)
        before, is_there, _ = marked.partition(_QUERY)
        if not (is_there and text.startswith(before)):
            raise RequestError(
                "the chat template must begin alike before any message: got one that "
                f"does not. {advice}"
            )
        text = text.removeprefix(before)
    if check is not None:
        check(text)
    tokens = encode_text(tokenizer, text, continues=is_begun)
    end = encode_text(tokenizer, opening, continues=True) if opening else []
    # Elsewhere the opening's first token is one with the text before it.
    is_apart = end and tokens[-len(end) :] == end
    num_stable = len(tokens) - (len(end) if is_apart else 1)
    return ChatPrompt(tokens, opening, num_stable)


def render_chat_template(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    *,
    advice: str,
    opens_answer: bool,
    continues_last: bool = False,
) -> str:
    """The text that messages make.

    Args:
        tokenizer: A tokenizer of mlx-lm's that has a chat template.
        messages: Roles and contents, oldest first.
        config: More arguments for the template.
        advice: What to do where the template refuses the messages, a sentence.
        opens_answer: Let the text end where an answer begins.
        continues_last: Whether the last message is the beginning of the answer: the
            text ends with its content, byte for byte.

    Raises:
        RequestError: The template does not take these messages.
    """
    if continues_last:
        return _opened(tokenizer, messages, config, advice, True)[0]
    return _rendered(tokenizer, messages, config, advice, opens_answer)


def _opened(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    advice: str,
    continues_last: bool,
) -> tuple[str, str]:
    """The text of messages with the answer's opening, and that opening alone.

    Templates trim and drop what stands in messages, so the answer's beginning goes
    behind what the template writes.
    """
    asked = messages[:-1] if continues_last else messages
    text = _rendered(tokenizer, asked, config, advice, opens_answer=True)
    closed = _rendered(tokenizer, asked, config, advice, opens_answer=False)
    start = len(closed) if text.startswith(closed) else num_common(text, closed)
    opening = text[start:]
    if continues_last:
        opening = _begun(tokenizer, opening, messages[-1])
    return text[:start] + opening, opening


def _begun(tokenizer: Any, opening: str, message: Mapping[str, Any]) -> str:
    """An answer's opening and its beginning, in the state that the opening leaves."""
    content = message.get("content") or ""
    thought = next((message[key] for key in _REASONS if message.get(key)), "")
    if thought:
        content = f"\n{THOUGHT_END}{content}" if content else ""
        content = f"{THOUGHT_OPENING}{thought}{content}"
    if content.startswith(THOUGHT_OPENING):
        # It takes the place of a thought that the template has opened, or left empty.
        opening = opening.removesuffix(THOUGHT_END).removesuffix(THOUGHT_OPENING)
    elif content and THOUGHT_END not in content:
        # A thought that the template has opened ends before the content begins.
        is_thought = AnswerReader(marks_of(tokenizer), opening=opening).is_thought
        opening += THOUGHT_END if is_thought else ""
    return opening + content


def _rendered(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    advice: str,
    opens_answer: bool,
) -> str:
    named = _with_names(messages)
    told, texts = _with_places(tokenizer, named)
    if texts:
        try:
            text = _written(tokenizer, told, config, advice, opens_answer)
        except RequestError:  # of these calls; the real ones may pass
            text = ""
        parts = text.split(_WRITTEN_PLACE)
        if len(parts) == len(texts) + 1:
            pairs = zip(parts, [*texts, ""], strict=True)
            return "".join(part + said for part, said in pairs)
    return _written(tokenizer, named, config, advice, opens_answer)


def _with_places(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Messages whose texts are no longer beside calls, and these texts in order.

    The place of each is kept by a call before the others.
    """
    found: list[Mapping[str, Any]] = []
    texts: list[str] = []
    for message in messages:
        calls = message.get("tool_calls")
        # Text beside results is what was said to them.
        is_first = calls and not message.get(_RESPONSES)
        text = _said(tokenizer, message) if is_first else ""
        if calls and text.strip():
            texts.append(text)
            message = {**message, "content": "", "tool_calls": [_PLACE_CALL, *calls]}
        found.append(message)
    return found, texts


def _said(tokenizer: Any, message: Mapping[str, Any]) -> str:
    """A message's text without the thoughts in it, which templates drop."""
    content = message.get("content")
    if not isinstance(content, str):
        return ""
    if THOUGHT_START not in content and THOUGHT_END not in content:
        return content
    parts = AnswerReader(marks_of(tokenizer)).read(content, is_last=True)
    return "".join(part.text for part in parts if part.kind == CONTENT)


def _written(
    tokenizer: Any,
    told: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    advice: str,
    opens_answer: bool,
) -> str:
    """What the template writes of messages, told in the way that it knows."""
    if not _reads_tool_messages(tokenizer):
        told = _with_responses(told)
    if any(map(_has_text_arguments, told)) and not _reads_text_arguments(tokenizer):
        told = [_with_objects(message) for message in told]
    try:
        text: str = tokenizer.apply_chat_template(
            told,
            tokenize=False,
            add_generation_prompt=opens_answer,
            **{THINKING: DEFAULT_THINKING, **config},
        )
    except Exception as error:  # templates raise whatever they like
        reason = " ".join(str(error).split())[:_MAX_REASON].rstrip(".")
        raise RequestError(
            f"the chat template must take this prompt: got {reason}. {advice}"
        ) from error
    return text


def _reads_tool_messages(tokenizer: Any) -> bool:
    """Whether the template knows messages of the role tool.

    Those of the first days know a call's results beside the call only, and would write
    such a message as a turn of its own, which Gemma has never seen.
    """
    source = tokenizer.chat_template
    return not isinstance(source, str) or not (
        _RESPONSES in source and "tool_call_id" not in source
    )


def _has_text_arguments(message: Mapping[str, Any]) -> bool:
    """Whether a message calls a tool with arguments that are no object."""
    calls = message.get("tool_calls") or ()
    return any(isinstance(call["function"].get("arguments"), str) for call in calls)


def _reads_text_arguments(tokenizer: Any) -> bool:
    """Whether the template writes arguments that are text; others raise, or drop it."""
    function = {"name": "f", "arguments": _TEXT}
    calls = [{"id": "0", "type": "function", "function": function}]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    try:
        return _TEXT in tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # noqa: BLE001 - templates raise whatever they like
        return False


def _with_objects(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose calls have objects: a text becomes their one argument."""
    if not _has_text_arguments(message):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"].get("arguments")
        if isinstance(arguments, str):
            function = {**call["function"], "arguments": {_ARGUMENT: arguments}}
            call = {**call, "function": function}
        calls.append(call)
    return {**message, "tool_calls": calls}


def _with_names(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The results of calls with the names of their tools, which templates want.

    A result belongs to the call of its ``tool_call_id``, else to the next one.
    """
    found: list[Mapping[str, Any]] = []
    names: dict[Any, str] = {}
    following: list[str] = []
    for message in messages:
        if message["role"] != "tool":
            calls = message.get("tool_calls") or ()
            following = [call["function"]["name"] for call in calls]
            names = {c.get("id"): c["function"]["name"] for c in calls if c.get("id")}
            found.append(message)
            continue
        next_name = following.pop(0) if following else "unknown"
        name = names.get(message.get("tool_call_id")) or message.get("name")
        found.append({**message, "name": name or next_name})
    return found


def _with_responses(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The results of calls beside the calls, and what was said to them behind both."""
    found: list[Mapping[str, Any]] = []
    for message in messages:
        last = found[-1] if found else {}
        if message["role"] == "tool" and last.get("tool_calls"):
            response = {"name": message["name"], "response": message.get("content")}
            found[-1] = {**last, _RESPONSES: [*(last.get(_RESPONSES) or ()), response]}
        elif (
            message["role"] == "assistant"
            and last.get(_RESPONSES)
            and not (last.get("content") or message.get("tool_calls"))
        ):
            found[-1] = {**last, "content": message.get("content")}
        else:
            found.append(message)
    return found
