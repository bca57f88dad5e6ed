"""Fields of OpenAI's, vLLM's and mlx-lm's bodies that are not obeyed here.

Those that would change what an answer holds are refused with the reason, unless they
ask for what is done anyway. Others mean nothing for a text and are accepted. Knows
nothing of what bodies have beside.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Set
from typing import Any

from .errors import bad_request

logger = logging.getLogger("mlx_gemma_mtp.server")

MAX_TOLD = 100
_MAX_NAME = 80  # characters that are told of a name

_FORM = (
    "structured_outputs says what form an answer has, and response_format. Send one "
    "of them"
)
_SPACE = "JSON is written without white space between its parts"
_TAGS = "tools are what an answer has beside its text. Send tools"
_TEXT_ONLY = "this server reads and writes text only"
_TOOLS = "it is the old form of tools. Send tools and tool_choice"
_TOKENS = "every token can be chosen. logit_bias makes some of them likely or unlikely"
_BEAMS = "there is no beam search. Ask for several choices by n"
_PARTS = "answers have no such part"
_MARKS = "the marks of thoughts and calls are read, and never shown in an answer"
_ADDED = "the prompt is encoded as the model wants it. Send token ids for another one"
_THINKING = (
    "reasoning_effort says whether the model thinks, max_thinking_tokens how long. "
    "Send them"
)
_CHATS = "it is a conversation's. Send messages to /v1/chat/completions"
_PROMPT = "prompts are never cut. Send a shorter one"

# Why a field is refused, and the values with which it asks for nothing.
_REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    # OpenAI's
    "audio": (_TEXT_ONLY, ()),
    "echo": ("the answer is what follows the prompt", (False,)),
    "function_call": (_TOOLS, ("none",)),
    "functions": (_TOOLS, ([],)),
    "modalities": (_TEXT_ONLY, (["text"], [])),
    "moderation": ("nobody watches over texts here", ()),
    "suffix": ("the model has not learnt to write what stands before a text", ("",)),
    "verbosity": ("the model knows none. Ask for it in a message", ("medium",)),
    "web_search_options": ("nothing is searched. Offer a tool that does", ()),
    # vLLM's
    "add_generation_prompt": ("an answer is always begun", (True,)),
    "allowed_token_ids": (_TOKENS, ([],)),
    "bad_words": (_TOKENS, ([],)),
    "chat_template": (
        "a template of a client's could run for ever. --chat-template names one when "
        "the server starts",
        ("",),
    ),
    "documents": ("the chat template has no place for them. Send messages", ([],)),
    "early_stopping": (_BEAMS, (False,)),
    "guided_choice": (_FORM, ([],)),
    "guided_decoding_backend": (_FORM, ()),
    "guided_grammar": (_FORM, ("",)),
    "guided_json": (_FORM, ()),
    "guided_json_object": (_FORM, (False,)),
    "guided_regex": (_FORM, ("",)),
    "guided_whitespace_pattern": (_SPACE, ()),
    "include_reasoning": ("reasoning is always told apart. Leave it unread", (True,)),
    "include_stop_str_in_output": ("the text ends before a stop string", (False,)),
    "length_penalty": (_BEAMS, (1,)),
    "logits_processors": ("a client's code is not run here", ([],)),
    "logprob_token_ids": ("top_logprobs names the most likely tokens only", ([],)),
    "prompt_embeds": ("prompts are texts or token ids", ()),
    "prompt_logprobs": ("log-probabilities are those of the answer only", ()),
    "repetition_detection": ("max_tokens is what ends a text that repeats itself", ()),
    "return_prompt_text": (_PARTS, (False,)),
    "return_token_ids": (_PARTS, (False,)),
    "return_tokens_as_token_ids": (_PARTS, (False,)),
    "skip_special_tokens": (_MARKS, (True,)),
    "structural_tag": (_TAGS, ("",)),
    "truncate_prompt_tokens": (_PROMPT, ()),
    "use_beam_search": (_BEAMS, (False,)),
    "vllm_xargs": ("it has no extensions", ({},)),
    "watermarking": ("texts have no watermark", (False,)),
    # of other servers, in wide use
    "ebnf": (_FORM, ("",)),
    "enable_thinking": (_THINKING, ()),
    "grammar": (_FORM, ("",)),
    "json_schema": (_FORM, ()),
    "reasoning": (_THINKING, ()),
    "regex": (_FORM, ("",)),
    "thinking": (_THINKING, ()),
    "thinking_budget": (_THINKING, (-1,)),
    # mlx-lm's
    "adapters": ("--adapter-path names them when the server starts", ()),
    "role_mapping": ("--chat-template says how roles are written", ()),
}
REFUSED_IN_CHATS: dict[str, tuple[str, tuple[Any, ...]]] = {
    **_REFUSED,
    "add_special_tokens": (_ADDED, (False,)),
    "best_of": (_BEAMS, (1,)),
}
REFUSED_IN_COMPLETIONS: dict[str, tuple[str, tuple[Any, ...]]] = {
    **_REFUSED,
    "add_special_tokens": (_ADDED, (True,)),
    "chat_template_kwargs": (_CHATS, ({},)),
    "continue_final_message": (_CHATS, (False,)),
    "messages": (_CHATS, ([],)),
    "reasoning_effort": (_CHATS, ()),
    "tool_choice": (_CHATS, ("auto", "none")),
    "tools": (_CHATS, ([],)),
    "top_logprobs": ("logprobs says how many here", (0, -1)),
}
REFUSED_IN_MESSAGES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "audio": (_TEXT_ONLY, ()),
    "function_call": ("it is the old form of tool_calls. Send these", ()),
}

# What says nothing of the text: names, bookkeeping, speed, media that are refused.
WITHOUT_EFFECT = frozenset(
    {
        "draft_model",
        "ec_transfer_params",
        "kv_transfer_params",
        "media_io_kwargs",
        "metadata",
        "mm_processor_kwargs",
        "num_draft_tokens",
        "parallel_tool_calls",
        "priority",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "return_mm_kwargs",
        "return_token_offsets",
        "routed_experts_prompt_start",
        "safety_identifier",
        "service_tier",
        "session_id",
        "spaces_between_special_tokens",
        "store",
        "stream_interval",
        "truncation_side",
        "user",
    }
)


class Fields:
    """Looks at the fields that no choice is made of."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def check_completion(self, extra: Mapping[str, Any]) -> None:
        """Look at those of a completion's body.

        Raises:
            AnswerError: One asks for something that is not done.
        """
        self.check(extra, REFUSED_IN_COMPLETIONS)

    def check_chat(
        self, extra: Mapping[str, Any], messages: Iterable[Mapping[str, Any]]
    ) -> None:
        """Look at those of a conversation's body, and of its messages.

        Raises:
            AnswerError: One asks for something that is not done.
        """
        self.check(extra, REFUSED_IN_CHATS)
        for number, fields in enumerate(messages):
            _refuse(REFUSED_IN_MESSAGES, fields, f"messages.{number}.")

    def check(
        self,
        extra: Mapping[str, Any],
        refused: Mapping[str, tuple[str, tuple[Any, ...]]],
        without_effect: Set[str] = WITHOUT_EFFECT,
    ) -> None:
        """Look at the fields of any dialect's body.

        Args:
            extra: Those that no choice is made of.
            refused: Why a field is refused, and the values with which it is not.
            without_effect: Those that say nothing of the text.

        Raises:
            AnswerError: One asks for something that is not done.
        """
        _refuse(refused, extra, "")
        for name in extra:
            if name not in refused and name not in without_effect:
                self.tell(name)

    def tell(self, name: str) -> None:
        """Say that a field means nothing, once, and of so many names."""
        name = name[:_MAX_NAME]
        if name not in self._told and len(self._told) < MAX_TOLD:
            self._told.add(name)
            logger.warning("requests have a field that means nothing here: %r", name)


def refused_fields(
    refused: Mapping[str, tuple[str, tuple[Any, ...]]],
) -> dict[str, dict[str, Any]]:
    """What ``/openapi.json`` says of fields that must have a harmless value.

    Args:
        refused: Why each is refused, and its harmless values.
    """
    return {
        name: {"description": f"Refused: {reason}.", "enum": [None, *harmless]}
        for name, (reason, harmless) in refused.items()
    }


def _refuse(
    refused: Mapping[str, tuple[str, tuple[Any, ...]]],
    fields: Mapping[str, Any],
    place: str,
) -> None:
    for name, value in fields.items():
        reason, harmless = refused.get(name, ("", ()))
        if reason and value is not None and not _is_one_of(value, harmless):
            name = f"{place}{name}"
            raise bad_request(f"{name} must be left out: {reason}.", name)


def _is_one_of(value: Any, others: tuple[Any, ...]) -> bool:
    """Whether a value is one of several as JSON tells them apart: true is not 1."""
    is_switch = isinstance(value, bool)
    return any(value == each and is_switch == isinstance(each, bool) for each in others)
