"""Messages to tokens, by the chat template that a tokenizer brings.

Templates are programs of the checkpoint's makers: they refuse what they do not know,
in any way they like. Here that is a mistake of the user's, in one line.

Marks that stand in a message's text become control tokens, as in other engines: the
template's text is encoded as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .answer import THOUGHT_END, THOUGHT_OPENING, AnswerReader, marks_of
from .encoding import encode_text
from .errors import RequestError

THINKING = "enable_thinking"  # the templates' variable
DEFAULT_THINKING = True  # as mlx-lm has it
_REASONS = ("reasoning", "reasoning_content")  # what a message's thought is called
_RESPONSES = "tool_responses"
_MAX_REASON = 300


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
) -> ChatPrompt:
    """The prompt that messages make.

    Args:
        tokenizer: A tokenizer of mlx-lm's that has a chat template.
        messages: Roles and contents, oldest first.
        config: More arguments for the template.
        advice: What to do where the template refuses the messages, a sentence.
        continues_last: Whether the last message is the beginning of the answer.

    Raises:
        RequestError: The template does not take these messages.
    """
    text, opening = _opened(tokenizer, messages, config, advice, continues_last)
    tokens = encode_text(tokenizer, text)
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
    start = len(closed) if text.startswith(closed) else _num_common(text, closed)
    opening = text[start:]
    if continues_last:
        opening += _beginning(tokenizer, opening, messages[-1])
    return text[:start] + opening, opening


def _num_common(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = zip(one, other, strict=False)
    return next(
        (i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other))
    )


def _beginning(tokenizer: Any, opening: str, message: Mapping[str, Any]) -> str:
    """An answer's beginning, in the state that the opening leaves it in."""
    content = message.get("content") or ""
    thought = next((message[key] for key in _REASONS if message.get(key)), "")
    is_thought = AnswerReader(marks_of(tokenizer), opening=opening).is_thought
    begin = THOUGHT_OPENING if thought and not is_thought else ""
    if not content:
        return f"{begin}{thought}"
    if thought:
        return f"{begin}{thought}\n{THOUGHT_END}{content}"
    # A thought that the template has opened ends before the content begins.
    return (
        f"{THOUGHT_END if is_thought and THOUGHT_END not in content else ''}{content}"
    )


def _rendered(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    advice: str,
    opens_answer: bool,
) -> str:
    if not _reads_tool_messages(tokenizer):
        messages = _with_responses(messages)
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=opens_answer,
            **{THINKING: DEFAULT_THINKING, **config},
        )
    except Exception as error:  # templates raise whatever they like
        reason = " ".join(str(error).split())[:_MAX_REASON]
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


def _with_responses(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The results of calls beside the calls, and what was said to them behind both."""
    found: list[Mapping[str, Any]] = []
    for message in messages:
        last = found[-1] if found else {}
        if message["role"] == "tool" and last.get("tool_calls"):
            response = {
                "name": _called(last, message),
                "response": message.get("content"),
            }
            found[-1] = {**last, _RESPONSES: [*last.get(_RESPONSES, ()), response]}
        elif (
            message["role"] == "assistant"
            and last.get(_RESPONSES)
            and not (last.get("content") or message.get("tool_calls"))
        ):
            found[-1] = {**last, "content": message.get("content")}
        else:
            found.append(message)
    return found


def _called(answer: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The tool whose result a message is."""
    for call in answer["tool_calls"]:
        if call.get("id") == result.get("tool_call_id"):
            return str(call["function"]["name"])
    return str(result.get("name") or "unknown")
