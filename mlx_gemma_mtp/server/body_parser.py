"""From the body of a request to choices, with everything that can be refused.

Knows nothing of HTTP, of the engine, or of how an answer is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..constants import AUTO, MAX_DRAFT_TOKENS
from ..generation.chat_template import THINKING
from ..sampling.params import SamplingParams
from ..structure.masks import BoundConstraint
from .choice import Choice
from .errors import AnswerError, bad_request
from .fields import Fields
from .forced_calls import NONE, ToolChoice
from .prompts import Prompt
from .schema import NO_LIMIT, ChatBody, CompletionBody
from .settings import DEFAULT_MODEL, Limits
from .thinking import NO_THINKING, ThinkingLimits

_NUM_SEEDS = 2**64
_CONTEXT_SIZE = 20  # mlx-lm's
_MAX_DIGITS = 12  # of a token id


class BodyParser:
    """Makes choices.

    Args:
        limits: What may be asked for; ``model_len`` is known by now.
        names: What the model is called.
        thinking: Limits thoughts.
        sampling: ``temp``, ``top_p``, ``top_k``, ``min_p`` where a request does not
            say.
        special_tokens: Tokens that XTC never excludes.
        vocab_size: Number of token ids.
        longest_alone: Tokens that prompt and answer of one request can have in memory.
        longest_shared: The same where it leaves memory to others.

    Attributes:
        fields: Looks at the fields that no choice is made of.
    """

    def __init__(
        self,
        limits: Limits,
        names: Sequence[str],
        thinking: ThinkingLimits,
        *,
        sampling: Mapping[str, Any],
        special_tokens: Sequence[int],
        vocab_size: int,
        longest_alone: int,
        longest_shared: int,
    ) -> None:
        assert limits.model_len is not None
        self._limits = limits
        self._names = (*names, DEFAULT_MODEL)
        self._thinking = thinking
        self._sampling = dict(sampling)
        self._special_tokens = tuple(special_tokens)
        self._vocab_size = vocab_size
        self._longest = min(limits.model_len, longest_alone)
        self._longest_shared = longest_shared
        self.fields = Fields()

    def check(self, body: CompletionBody | ChatBody) -> None:
        """Refuse what can be refused before there is a prompt.

        Raises:
            AnswerError: The model is not served, or a field asks for what is not done.
        """
        self.check_model(body.model)
        extra = body.model_extra or {}
        if isinstance(body, ChatBody):
            messages = [message.model_extra or {} for message in body.messages]
            self.fields.check_chat(extra, messages)
        else:
            self.fields.check_completion(extra)
        self._thinking.check(body)
        for token in body.stop_token_ids or ():
            self.check_id("stop_token_ids", token)

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served.

        Raises:
            AnswerError: It is not.
        """
        if name is not None and name not in self._names:
            raise AnswerError(
                404,
                f"model must be {self._names[0]!r}: got {name[:100]!r}. /v1/models "
                "names it.",
                param="model",
                code="model_not_found",
            )

    @property
    def model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._longest

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._vocab_size

    @property
    def limits_thoughts(self) -> bool:
        """Whether thoughts can be limited."""
        return self._thinking.are_possible

    def of_completion(
        self,
        body: CompletionBody,
        prompts: Sequence[Prompt],
        form: BoundConstraint | None = None,
    ) -> list[Choice]:
        """Those of the first prompt, then of the next."""
        if body.best_of not in (None, 1, body.n):
            raise bad_request(
                f"best_of must be n: got {body.best_of}. Every choice is answered.",
                "best_of",
            )
        num_logprobs = self._num_logprobs(body.logprobs, "logprobs")
        return [
            choice
            for prompt in prompts
            for choice in self._of(body, prompt, num_logprobs, form)
        ]

    def tools_of(self, body: ChatBody, *, has_tools: bool) -> list[dict[str, Any]]:
        """The tools that the model may call; empty for none.

        Args:
            body: The request.
            has_tools: Whether the chat template has tools.

        Raises:
            AnswerError: There is no such choice, or the template calls no tools.
        """
        choice = ToolChoice.of(body)
        if not body.tools or choice.kind == NONE:
            return []
        if not has_tools:
            raise bad_request(
                "tools need a chat template that calls them as Gemma does: this model "
                "has none. Leave them out, or send tool_choice: none.",
                "tools",
            )
        return [tool.model_dump(exclude_unset=True) for tool in body.tools]

    def template_args_of(self, body: ChatBody) -> dict[str, Any]:
        """What the request says of the chat template's variables.

        Any effort but none is a thought; ``chat_template_kwargs`` count before it.
        """
        effort = body.reasoning_effort
        thinking = {} if effort is None else {THINKING: effort.lower() != NO_THINKING}
        return {**thinking, **(body.chat_template_kwargs or {})}

    def of_chat(
        self,
        body: ChatBody,
        prompt: Prompt,
        form: BoundConstraint | None = None,
    ) -> list[Choice]:
        """Those of a conversation: as many as are asked for.

        Args:
            body: The request.
            prompt: The conversation.
            form: What the answers must be; None for anything.
        """
        num_logprobs = None
        if body.logprobs:
            num_logprobs = self._num_logprobs(body.top_logprobs or 0, "top_logprobs")
        elif body.top_logprobs:
            raise bad_request(
                "top_logprobs must stand beside logprobs: true. Add it, or leave out "
                "top_logprobs.",
                "top_logprobs",
            )
        return self._of(body, prompt, num_logprobs, form)

    def _of(
        self,
        body: CompletionBody | ChatBody,
        prompt: Prompt,
        num_logprobs: int | None,
        form: BoundConstraint | None,
    ) -> list[Choice]:
        """The choices of one prompt."""
        self._check_tokens(prompt.tokens)
        max_tokens = self._max_tokens(len(prompt.tokens), self._asked_tokens(body))
        min_tokens = body.min_tokens or 0
        if min_tokens > max_tokens:
            raise bad_request(
                f"min_tokens must be at most max_tokens, {max_tokens} here: got "
                f"{min_tokens}. Ask for more tokens at most, or for fewer at least.",
                "min_tokens",
            )
        stop = body.stop or ()
        constraint = self._thinking.constraint_of(
            body,
            form,
            is_thinking=isinstance(body, ChatBody) and self._thinks(body),
            max_tokens=max_tokens,
        )
        drafts = body.speculative.num_draft_tokens if body.speculative else None
        penalties = self._penalties(body)
        return [
            Choice(
                prompt=prompt.tokens,
                max_tokens=max_tokens,
                sampling=self._sampling_of(body, choice),
                stop=(stop,) if isinstance(stop, str) else tuple(stop),
                num_logprobs=num_logprobs,
                max_draft_tokens=drafts
                if isinstance(drafts, int)
                else MAX_DRAFT_TOKENS,
                draft_source=body.speculative.draft_source
                if body.speculative
                else AUTO,
                penalties=penalties,
                places=prompt.places,
                min_tokens=min_tokens,
                stop_token_ids=frozenset(body.stop_token_ids or ()),
                ignores_eos=bool(body.ignore_eos),
                cache_salt=body.cache_salt,
                constraint=constraint,
                is_reasoning=prompt.is_reasoning,
                prediction=prompt.prediction,
            )
            for choice in range(body.n or 1)
        ]

    def _thinks(self, body: ChatBody) -> bool:
        """Whether the request lets the chat template ask for thoughts."""
        return self.template_args_of(body).get(THINKING) is not False

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise bad_request(
                "the prompt must hold at least one token: got none. Send some text.",
                "prompt",
            )
        if max(tokens) >= self._vocab_size:
            raise bad_request(
                f"token ids must be below {self._vocab_size}: got {max(tokens)}. Is "
                "this the model's own tokenizer?",
                "prompt",
            )

    def _asked_tokens(self, body: CompletionBody | ChatBody) -> int | None:
        """The limit of tokens that a body names; None for no limit.

        Null is no limit, but only where it stands in the body and no number does.
        """
        asked = body.max_completion_tokens
        if asked is None:
            asked = body.max_tokens
        if asked is not None:
            return None if asked == NO_LIMIT else asked
        is_said = {"max_completion_tokens", "max_tokens"} & body.model_fields_set
        return None if is_said else self._limits.tokens

    def _max_tokens(self, num_prompt_tokens: int, asked: int | None) -> int:
        """Tokens that the answer may have: as many as asked for, or as there can be.

        Memory is reserved for all of them. A request without a limit leaves some of it
        to others, unless it would get less than one that does not say.
        """
        left = self._longest - num_prompt_tokens
        if left < 1:
            raise AnswerError(
                400,
                f"prompt and answer must have at most {self._longest} tokens: got "
                f"{num_prompt_tokens} and 1 or more. Shorten the prompt.",
                param="prompt",
                code="context_length_exceeded",
            )
        if asked is None:
            shared = self._longest_shared - num_prompt_tokens
            asked = max(shared, self._limits.tokens)
        return min(left, asked)

    def _num_logprobs(self, asked: int | None, name: str) -> int | None:
        if asked is not None and asked > self._limits.logprobs:
            raise bad_request(
                f"{name} must be at most {self._limits.logprobs}: got {asked}. Ask "
                "for fewer.",
                name,
            )
        return asked

    def _sampling_of(
        self, body: CompletionBody | ChatBody, choice: int
    ) -> SamplingParams:
        """How a choice's tokens are drawn; a seed gives every choice its own text."""
        asked = {
            "temp": body.temperature,
            "top_p": body.top_p,
            "top_k": None if body.top_k is None else max(body.top_k, 0),
            "min_p": body.min_p,
        }
        settings: dict[str, Any] = {
            name: self._sampling[name] if value is None else value
            for name, value in asked.items()
        }
        if not settings["temp"]:
            return SamplingParams()  # filters mean nothing, nor does a seed
        seed = None if body.seed is None else (body.seed + choice) % _NUM_SEEDS
        if body.xtc_probability:
            settings["xtc_probability"] = body.xtc_probability
            settings["xtc_special_tokens"] = self._special_tokens
            if body.xtc_threshold is not None:
                settings["xtc_threshold"] = body.xtc_threshold
        return SamplingParams(**settings, seed=seed)

    def _penalties(self, body: CompletionBody | ChatBody) -> dict[str, Any]:
        """Keywords for mlx-lm's ``make_logits_processors``; empty for none."""
        found: dict[str, Any] = {}
        given = {
            "repetition": (body.repetition_penalty, body.repetition_context_size),
            "presence": (body.presence_penalty, body.presence_context_size),
            "frequency": (body.frequency_penalty, body.frequency_context_size),
        }
        for name, (penalty, size) in given.items():
            is_on = penalty and not (name == "repetition" and penalty == 1)
            if is_on:
                found[f"{name}_penalty"] = penalty
                found[f"{name}_context_size"] = _CONTEXT_SIZE if size is None else size
        if body.logit_bias:
            found["logit_bias"] = self._logit_bias(body.logit_bias)
        return found

    def _logit_bias(self, given: Mapping[str, float]) -> dict[int, float]:
        for token in given:
            is_id = token.isascii() and token.isdecimal() and len(token) < _MAX_DIGITS
            self.check_id("logit_bias", int(token) if is_id else token)
        return {int(token): bias for token, bias in given.items()}

    def check_id(self, name: str, token: int | str) -> None:
        """Refuse what is no token's id.

        Raises:
            AnswerError: It is not.
        """
        if isinstance(token, str) or token >= self._vocab_size:
            raise bad_request(
                f"{name} must name token ids from 0 to {self._vocab_size - 1}: got "
                f"{token!r:.42}. Is this the model's own token id?",
                name,
            )
