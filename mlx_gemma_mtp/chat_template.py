"""Messages to tokens, by the chat template that a tokenizer brings.

Templates are programs of the checkpoint's makers: they refuse what they do not know,
in any way they like. Here that is a mistake of the user's, in one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import RequestError


def apply_chat_template(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    *,
    advice: str,
    continues_last: bool = False,
) -> list[int]:
    """The prompt that messages make.

    Args:
        tokenizer: A tokenizer of mlx-lm's that has a chat template.
        messages: Roles and contents, oldest first.
        config: More arguments for the template.
        advice: What to do where the template refuses the messages, a sentence.
        continues_last: Leave the last message open, in place of opening an answer.

    Returns:
        Token ids, the begin-of-sequence token included where the template writes it.

    Raises:
        RequestError: The template does not take these messages.
    """
    text = render_chat_template(
        tokenizer,
        messages,
        config,
        advice=advice,
        opens_answer=not continues_last,
        continues_last=continues_last,
    )
    return list(tokenizer.encode(text, add_special_tokens=False))


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
        continues_last: Leave the last message open.

    Raises:
        RequestError: The template does not take these messages.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            continue_final_message=continues_last,
            add_generation_prompt=opens_answer,
            **config,
        )
    except Exception as error:  # templates raise whatever they like
        reason = " ".join(str(error).split())
        raise RequestError(
            f"the chat template must take this prompt: got {reason}. {advice}"
        ) from error
    return text
