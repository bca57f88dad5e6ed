"""The chat: conversations, caches kept between turns, commands, the terminal.

Whether a cache was used again is seen by how many tokens the target reads, never by
time.

Run: python -m pytest tests/chat/test_chat.py
"""

import ctypes
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import mlx_gemma_mtp
from mlx_gemma_mtp.chat import __main__ as chat
from mlx_gemma_mtp.chat.commands import COMMANDS, HELP, OTHER_NAMES, Commands
from mlx_gemma_mtp.chat.conversation import Conversation
from mlx_gemma_mtp.chat.history import MAX_ENTRIES, History
from mlx_gemma_mtp.chat.prompts import PlainPrompts, TemplatePrompts, num_stable
from mlx_gemma_mtp.chat.reader import read_message
from mlx_gemma_mtp.chat.session import Session, Settings
from mlx_gemma_mtp.errors import MTPError, RequestError
from mlx_gemma_mtp.models.target import Target
from mlx_gemma_mtp.sampling.defaults import SamplingDefaults
from tests.tiny import (
    CHAT_TEMPLATE,
    endless_folder,
    model_folder,
    tiny_tokenizer,
)

pytestmark = pytest.mark.usefixtures("plain_graphs")

SESSION = import_module("mlx_gemma_mtp.chat.session")
ROOT = Path(__file__).parents[2]
WINDOW = 16  # of the random pairs
LONG = "the rain in the north and the heat in the south are one another"
# As Gemma's does, it opens an answer in another way than it shows an old one.
OPENING = {"opening": "a thought"}
PLAIN_GRAPHS = {"MLX_DISABLE_COMPILE": "1"}  # in processes whose rounds are not tested


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("chat") / "plain")


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "template"
    return model_folder(folder, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    return endless_folder(tmp_path_factory.mktemp("chat") / "endless")


@pytest.fixture(scope="module")
def random_pair(folder):
    return mlx_gemma_mtp.load(folder)


@pytest.fixture(scope="module")
def chat_pair(chat_folder):
    return mlx_gemma_mtp.load(chat_folder)


@pytest.fixture(scope="module")
def embedded():
    return mlx_gemma_mtp.load(mlx_gemma_mtp.embedded_pair_path())


@pytest.fixture
def num_read(monkeypatch):
    """The numbers of prompt tokens that the target reads, forward by forward."""
    numbers = []
    read = Target.read

    def counted(self, tokens, caches):
        numbers.append(tokens.size)
        return read(self, tokens, caches)

    monkeypatch.setattr(Target, "read", counted)
    return numbers


def make_session(
    pair: Any,
    *,
    config: Any = None,
    system: Any = None,
    drafts: Any = "auto",
    source: Any = "drafter",
    folder: Any = None,
    **changes: Any,
) -> Any:
    model, tokenizer = pair
    prompts = (
        TemplatePrompts(tokenizer, config or {})
        if tokenizer.has_chat_template
        else PlainPrompts(tokenizer)
    )
    settings: dict[str, Any] = {
        "max_tokens": 12,
        "prefill_step_size": 2048,
        "exactness": "fast",  # no time for a probe
        "stop": (),
        "sampling": {},
    }
    return Session(
        model,
        tokenizer,
        prompts,
        Settings(**settings | changes),
        num_draft_tokens=drafts,
        draft_source=source,
        system=system,
        prompt_folder=folder,
    )


def say(session, question):
    """The whole answer."""
    return "".join(
        part.text for said in session.answer(question) for part in said.parts
    )


def is_all_that_was_read(numbers, turn):
    """Whether forwards read a turn's new tokens and no others.

    An answer's last token may take one more of one row to be in the cache.
    """
    assert numbers[0] > 0
    return sum(numbers) - turn.num_read in (0, 1)


def one_line(error):
    text = str(error)
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def read_anew(embedded):
    """Questions, and the answers of plain decoding that keeps nothing."""
    fresh = make_session(embedded, drafts=0)
    questions = ["def area(radius):", "class Stack:", "    def push(self, x):"]
    answers = []
    for question in questions:
        fresh.kept.clear()
        answers.append(say(fresh, question))
        assert fresh.last.num_cached == 0
    return questions, answers


class TestReader:
    @pytest.mark.parametrize(
        ("lines", "messages"),
        [
            (["one", "two"], ["one", "two"]),
            (["one\\", "two\\", "three", "four"], ["one\ntwo\nthree", "four"]),
            (["one\\"], ["one"]),
            (['"""one', "", 'two"""', "three"], ["one\n\ntwo", "three"]),
            (['"""', "    one", "two", '"""', "x"], ["    one\ntwo", "x"]),
            (['"""one""" and', "two"], ["one and", "two"]),
            (['"""', "one\\", "two"], ["one\\\ntwo"]),
            (['""""""', "one"], ["", "one"]),
            (['"""', '"""', "one"], ["", "one"]),
            (["", "one"], ["", "one"]),
            (["a\n\n  b\\\nc", "d"], ["a\n\n  b\\\nc", "d"]),  # pasted
            (['"""a\nb"""', "c"], ["a\nb", "c"]),
            (['"""\na\nb\n"""\nc\nd', "e"], ["a\nb\nc\nd", "e"]),
            (['"""\na', 'b\n"""', "c"], ["a\nb", "c"]),
            ([], []),
        ],
    )
    def test_messages(self, lines, messages):
        rest = iter(lines)
        found = []
        while (message := read_message(lambda _: next(rest, None))) is not None:
            found.append(message)
        assert found == messages

    def test_asks_for_the_rest_in_another_way(self):
        asked = []
        lines = iter(["one\\", "two"])

        def ask(has_begun):
            asked.append(has_begun)
            return next(lines)

        read_message(ask)
        assert asked == [False, True]


class TestConversation:
    def test_goes_to_json_and_back(self):
        said = Conversation("be brief")
        said.add("hé", 'a "b"\n')
        said.add("c", "")
        text = said.to_json()
        assert Conversation.from_json(text, source="x").messages() == said.messages()
        assert json.loads(text)["messages"][:2] == [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hé"},
        ]

    def test_undo(self):
        said = Conversation()
        said.add("a", "b")
        said.add("c", "d")
        assert said.undo().question == "c"
        assert [m["content"] for m in said.messages("e")] == ["a", "b", "e"]
        said.undo()
        with pytest.raises(RequestError, match="empty conversation"):
            said.undo()

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("", "must be JSON"),
            ("[" * 100_000, "must be JSON"),
            ("[]", "must hold messages"),
            ('{"messages": {}}', "must hold messages"),
            ('{"messages": [1]}', "must have a role and a content"),
            ('{"messages": [{"role": "user"}]}', "must have a role and a content"),
            (
                '{"messages": [{"role": "user", "content": []}]}',
                "must have a role and a content",
            ),
            ('{"messages": [{"role": "user", "content": "a"}]}', "in turn"),
            ('{"messages": [{"role": "tool", "content": "a"}]}', "in turn"),
            ('{"messages": [{"role": "assistant", "content": "a"}]}', "in turn"),
        ],
    )
    def test_what_is_none(self, text, reason):
        with pytest.raises(RequestError, match=reason) as error:
            Conversation.from_json(text, source="it.json")
        assert "it.json" in one_line(error.value)


class TestPrompts:
    def test_plain_text_keeps_messages_on_lines_of_their_own(self):
        tokenizer = tiny_tokenizer()
        said = Conversation("one")
        said.add("two", "three")
        said.add("four\n", "five\n")
        tokens = PlainPrompts(tokenizer).prompt(said, "six").tokens
        text = "one\ntwo\nthree\nfour\nfive\nsix\n"
        assert tokens == tokenizer.encode(text)

    @pytest.mark.parametrize("config", [{}, OPENING])
    def test_the_next_prompt_begins_with_what_is_stable(self, chat_pair, config):
        prompts = TemplatePrompts(chat_pair[1], config)
        said = Conversation()
        said.add("a", "b")
        prompt = prompts.prompt(said, "question").tokens
        stable = num_stable(prompts, said, "question", prompt)
        assert len(prompts.prompt(said, "").tokens) - 8 < stable < len(prompt)
        for answer in ("the rain", "\n", "", "a thought"):
            later = prompts.prompt(said, "question", answer, "more").tokens
            assert later[:stable] == prompt[:stable]

    def test_one_token_is_always_left(self, embedded):
        prompts = PlainPrompts(embedded[1])
        prompt = prompts.prompt(Conversation(), "def f():").tokens
        stable = num_stable(prompts, Conversation(), "def f():", prompt)
        assert 0 < stable < len(prompt)

    def test_a_template_that_refuses_what_may_come(self, chat_pair):
        """It may take the real messages all the same: only nothing is stable then."""

        class Refusing(TemplatePrompts):
            def prompt(self, conversation, *further):
                if len(further) > 1:
                    raise RequestError("no")
                return super().prompt(conversation, *further)

        prompts = Refusing(chat_pair[1], {})
        prompt = prompts.prompt(Conversation(), "a").tokens
        assert num_stable(prompts, Conversation(), "a", prompt) == 0


class TestHistory:
    def test_goes_on_in_the_next_session(self, tmp_path):
        path = tmp_path / "new" / "history"
        first, second = History(path), History(path)
        for history, message in [(first, "a\n b"), (second, "é"), (first, "c")]:
            history.add(message)
        assert History(path).read() == ["a\n b", "é", "c"]
        assert path.stat().st_mode & 0o777 == 0o600

    def test_is_bounded(self, tmp_path):
        path = tmp_path / "history"
        path.write_text("".join(f'"{i}"\n' for i in range(3 * MAX_ENTRIES)))
        path.chmod(0o644)
        newest = [str(i) for i in range(2 * MAX_ENTRIES, 3 * MAX_ENTRIES)]
        assert History(path).read() == newest
        assert path.read_text() == "".join(f'"{i}"\n' for i in newest)
        assert path.stat().st_mode & 0o777 == 0o600
        History(path).add("x" * 100_000)
        path.write_bytes(b"x" * 10**7 + b'\n"last"\n')
        assert History(path).read() == ["last"]
        assert path.read_text() == '"last"\n'

    def test_what_is_none(self, tmp_path):
        path = tmp_path / "history"
        path.write_bytes(b'\xff\n"a"\n{}\n[[\n' + b"[" * 100_000 + b'\n"b"')
        assert History(path).read() == ["a", "b"]

    def test_a_place_that_cannot_be_written_is_said_once(self, tmp_path, caplog):
        (tmp_path / "file").touch()
        history = History(tmp_path / "file" / "history")
        assert history.read() == []
        for _ in range(2):
            history.add("a")
        assert [r.getMessage().count("\n") for r in caplog.records] == [0]
        nowhere = History(None)
        nowhere.add("a")
        assert nowhere.read() == []


class TestReuse:
    """With the embedded pair, whose text is tokenized as it was generated."""

    def test_only_what_is_new_is_read(self, embedded, num_read):
        session = make_session(embedded)
        say(session, "def area(radius):")
        assert session.last.num_cached == 0
        assert is_all_that_was_read(num_read, session.last)
        for question in ("def volume(radius):", "def length(radius):"):
            num_read.clear()
            before = session.last.num_prompt + 12
            say(session, question)
            # All tokens of the turn before are there; past the window of 32 too.
            assert session.last.num_cached == before
            assert is_all_that_was_read(num_read, session.last)
        assert before > 32

    def test_the_text_is_that_of_reading_everything(self, embedded, read_anew):
        questions, answers = read_anew
        session = make_session(embedded)
        assert [say(session, question) for question in questions] == answers
        assert session.last.num_cached > 32

    def test_drafts_may_change_between_turns(self, embedded, read_anew):
        questions, answers = read_anew
        session = make_session(embedded)
        for number, question, answer in zip([4, 0, 2], questions, answers, strict=True):
            session.num_draft_tokens = number
            assert say(session, question) == answer
        assert session.last.num_cached > 32

    def test_an_answer_said_again(self, embedded, num_read):
        """Past the window the end of the turn before is still there."""
        session = make_session(embedded, max_tokens=20)
        say(session, "def area(radius):")
        answer = say(session, "class Stack:")
        session.conversation.undo()
        num_read.clear()
        assert say(session, "class Stack:") == answer
        # The question's end was kept as well; few tokens open the answer.
        assert is_all_that_was_read(num_read, session.last)
        assert session.last.num_read < 4
        assert session.last.num_prompt > 32

    def test_another_question_after_undo(self, embedded, num_read):
        session = make_session(embedded, max_tokens=24)
        say(session, "def area(radius):")
        end = session.last.num_prompt + 24
        say(session, "class Stack:")
        session.conversation.undo()
        num_read.clear()
        say(session, "import os")
        assert session.last.num_cached == end > 32
        assert is_all_that_was_read(num_read, session.last)

    def test_an_answer_that_was_stopped(self, embedded, num_read):
        session = make_session(embedded, max_tokens=40, drafts=4)
        with closing(session.answer("def area(radius):")) as answer:
            parts = [part for said in islice(answer, 7) for part in said.parts]
        said = "".join(part.text for part in parts)
        assert session.conversation.messages()[1]["content"] == said
        end = session.last.num_prompt + 7
        num_read.clear()
        say(session, "class Stack:")
        assert session.last.num_cached >= end - 1  # the last token may be cut in two
        assert is_all_that_was_read(num_read, session.last)


class TestTemplateReuse:
    """With a random pair, whose answers are tokenized anew in every other way."""

    @pytest.mark.parametrize("config", [{}, OPENING])
    def test_what_is_stable_is_not_read_again(self, chat_pair, num_read, config):
        session = make_session(chat_pair, config=config)
        say(session, LONG)
        assert session.last.num_prompt > 2 * WINDOW
        stable = num_stable(
            session.prompts,
            Conversation(),
            LONG,
            session.prompts.prompt(Conversation(), LONG).tokens,
        )
        num_read.clear()
        say(session, "and the west")
        assert session.last.num_cached >= stable > 2 * WINDOW
        assert is_all_that_was_read(num_read, session.last)

    def test_the_text_is_that_of_reading_everything(self, chat_pair):
        questions = [LONG, "and the west", LONG]
        kept = make_session(chat_pair, config=OPENING)
        answers = [say(kept, question) for question in questions]
        assert kept.last.num_cached > 0
        fresh = make_session(chat_pair, config=OPENING, drafts=0)
        for question, answer in zip(questions, answers, strict=True):
            fresh.kept.clear()
            assert say(fresh, question) == answer

    def test_prompts_are_read_in_steps(self, chat_pair, num_read):
        session = make_session(chat_pair, prefill_step_size=7)
        say(session, LONG)
        assert max(num_read) == 7
        assert is_all_that_was_read(num_read, session.last)

    def test_a_long_prompt_is_kept_at_rungs(self, chat_pair, monkeypatch):
        monkeypatch.setattr(SESSION, "rung_interval", lambda step_size: 32)
        question, half = 6 * LONG, 3 * LONG
        session = make_session(chat_pair)
        say(session, question)
        session.conversation = Conversation(None)
        text = say(session, half)
        assert session.last.num_cached >= 64
        assert session.last.num_cached % 32 == 0
        session.reset()
        assert say(session, half) == text
        assert session.last.num_cached == 0

    def test_another_session_goes_on(self, chat_pair, tmp_path):
        question = LONG * (700 // len(chat_pair[1].encode(LONG)))
        texts, cached = [], []
        for _ in range(2):
            session = make_session(chat_pair, folder=str(tmp_path))
            texts.append(say(session, question))
            cached.append(session.last.num_cached)
            session.close()
        assert texts[0] == texts[1]
        assert cached[0] == 0
        assert cached[1] >= 512

    def test_reset_forgets(self, chat_pair):
        session = make_session(chat_pair)
        say(session, LONG)
        session.reset()
        assert len(session.kept) == len(session.conversation) == 0
        say(session, LONG)
        assert session.last.num_cached == 0


class TestSession:
    def test_processors_see_what_was_kept(self, embedded):
        seen = []

        def record(tokens, logits):
            seen.append(tokens.tolist())
            return logits

        session = make_session(embedded, max_tokens=4, logits_processors=[record])
        for question in ("def area(radius):", "class Stack:"):
            seen.clear()
            say(session, question)
            assert [len(tokens) for tokens in seen[:4]] == [
                session.last.num_prompt + i for i in range(4)
            ]
        assert session.last.num_cached > 0

    def test_a_conversation_that_is_too_long(self, embedded):
        session = make_session(embedded, max_tokens=-1)
        assert session.max_context == 1024
        with pytest.raises(RequestError, match="shorter than 1024 tokens") as error:
            say(session, "x = 1\n" * 400)
        one_line(error.value)
        assert len(session.conversation) == 0

    @pytest.mark.parametrize("max_tokens", [-1, 12])
    def test_an_answer_ends_where_the_context_does(self, embedded, max_tokens):
        session = make_session(embedded, max_tokens=max_tokens)
        question = "def area(radius):"
        num_tokens = len(session.prompts.prompt(Conversation(), question).tokens)
        session.max_context = num_tokens + 5
        answer = list(session.answer(question))
        assert len(answer) == 5
        assert answer[-1].response.finish_reason == "length"
        assert session.is_full
        with pytest.raises(RequestError, match=f"shorter than {num_tokens + 5}"):
            say(session, "more")

    def test_a_question_without_an_answer_is_dropped(self, embedded):
        session = make_session(embedded)
        responses = session.answer("def area(radius):")
        responses.close()
        assert len(session.conversation) == 0
        assert session.last is None

    def test_an_error_in_the_middle(self, embedded, monkeypatch):
        """What was said stays; caches of which nobody knows what they hold do not."""
        session = make_session(embedded)
        stream = SESSION.stream_generate

        def failing(*args, **settings):
            responses = stream(*args, **settings)
            yield from islice(responses, 3)
            responses.close()
            raise KeyboardInterrupt

        monkeypatch.setattr(SESSION, "stream_generate", failing)
        with pytest.raises(KeyboardInterrupt):
            say(session, "def area(radius):")
        assert len(session.conversation) == 1
        monkeypatch.undo()
        say(session, "def area(radius):")
        prompt = session.prompts.prompt(Conversation(), "def area(radius):").tokens
        assert session.last.num_cached <= len(prompt)

    def test_drafts_from_what_was_said(self, embedded):
        """Kept prompts name their tokens; the answers stay as they are."""
        sessions = [
            make_session(embedded, drafts=3, source=s) for s in ("drafter", "lookup")
        ]
        question = "def area(radius):"
        answers = [[say(each, question) for _ in range(2)] for each in sessions]
        assert answers[0] == answers[1]
        stats = sessions[1].totals.stats
        assert stats.drafted_from.keys() == {"lookup"}
        assert sessions[1].last.num_cached > 0

    def test_totals(self, embedded):
        session = make_session(embedded, drafts=2)
        assert not session.is_full
        for question in ("def area(radius):", "class Stack:"):
            say(session, question)
        totals = session.totals
        assert (totals.answers, totals.tokens) == (2, 24)
        assert totals.stats.drafted == 2 * totals.stats.rounds
        assert totals.num_cached == session.last.num_cached
        assert not session.is_full


@pytest.fixture
def commands(embedded):
    session = make_session(embedded)
    return Commands(session, drafts="auto", shows_stats=False), session


class TestCommands:
    def test_every_command_is_carried_out(self, commands):
        assert {c.name for c in COMMANDS} == set(commands[0]._actions)
        assert all(c.usage in HELP and c.help in HELP for c in COMMANDS)

    def test_help(self, commands):
        assert commands[0].run("/help") == HELP

    def test_stats(self, commands):
        found, session = commands
        assert found.run("/stats") == "No answer yet."
        session.num_draft_tokens = 3
        say(session, "def area(radius):")
        text = found.run("/stats")
        assert "tokens per second" in text
        assert "(12 tokens)" in text
        assert "rounds " in text
        assert "with K = 3; accepted by position" in text
        assert "rule: " in text
        assert "Memory: peak " in text
        assert "All " not in text
        say(session, "class Stack:")
        text = found.run(" /stats ")
        assert "All 2 answers:" in text
        assert "(24 tokens)" in text
        assert f"{session.last.num_cached} of them kept from before" in text

    def test_stats_after_every_answer(self, commands):
        found, _ = commands
        found.run("/stats on")
        assert found.shows_stats
        found.run("/stats off")
        assert not found.shows_stats

    def test_drafts(self, commands):
        found, session = commands
        for argument, expected in [("off", 0), ("3", 3), ("on", "auto"), ("0", 0)]:
            found.run(f"/drafts {argument}")
            assert session.num_draft_tokens == expected

    def test_drafts_that_a_flag_named(self, embedded):
        session = make_session(embedded, drafts=0)
        Commands(session, drafts=5, shows_stats=False).run("/drafts on")
        assert session.num_draft_tokens == 5
        Commands(session, drafts=0, shows_stats=False).run("/drafts on")
        assert session.num_draft_tokens == "auto"

    def test_drafts_without_a_drafter(self):
        path = mlx_gemma_mtp.embedded_pair_path()
        pair = mlx_gemma_mtp.load(path, speculative_decoding=False)
        found = Commands(make_session(pair), drafts="auto", shows_stats=False)
        with pytest.raises(RequestError, match="without a drafter"):
            found.run("/drafts on")
        found.run("/drafts off")
        session = make_session(pair, source="lookup")
        found = Commands(session, drafts="auto", shows_stats=False)
        for argument, expected in [("off", 0), ("on", "auto"), ("4", 4)]:
            found.run(f"/drafts {argument}")
            assert session.num_draft_tokens == expected

    @pytest.mark.parametrize(
        ("line", "name", "value", "shown"),
        [
            ("/temp 0.7", "temp", 0.7, "/temp 0.7"),
            ("/top-p .9", "top_p", 0.9, "/top-p 0.9"),
            ("/top-k 40", "top_k", 40, "/top-k 40"),
            ("/min-p 0.05", "min_p", 0.05, "/min-p 0.05"),
            ("/seed 7", "seed", 7, "/seed 7"),
            ("/seed off", "seed", None, "/seed off"),
            ("/max-tokens 3", "max_tokens", 3, "/max-tokens 3"),
            ("/max-tokens -1", "max_tokens", -1, "/max-tokens -1"),
        ],
    )
    def test_settings(self, commands, line, name, value, shown):
        found, session = commands
        assert found.run(line) == shown == found.run(line.split()[0])
        assert session.settings.value(name) == value

    def test_settings_decide_of_the_next_answer(self, commands):
        found, session = commands
        greedy = say(session, "def area(radius):")
        for line in ("/temp 3", "/seed 1", "/max-tokens 5"):
            found.run(line)
        assert not greedy.startswith(say(session, "def area(radius):"))
        assert session.last.response.generation_tokens == 5

    def test_thinking(self, chat_pair):
        config = {"has_system": True}
        session = make_session(chat_pair, config=config)
        found = Commands(session, drafts="auto", shows_stats=False)
        assert found.run("/thinking") == "/thinking on"
        assert found.run("/thinking off") == "/thinking off"
        assert session.prompts._config == {"has_system": True, "enable_thinking": False}
        assert config == {"has_system": True}

    def test_thinking_without_a_template(self, random_pair):
        found = Commands(make_session(random_pair), drafts="auto", shows_stats=False)
        with pytest.raises(RequestError, match="must have a chat template"):
            found.run("/thinking off")

    @pytest.mark.parametrize("name", OTHER_NAMES)
    def test_other_names(self, commands, name):
        found, _ = commands
        assert found.is_meant(name)
        assert OTHER_NAMES[name] in found._actions
        if OTHER_NAMES[name] == "/help":
            assert found.run(name) == HELP

    @pytest.mark.parametrize("message", ["//q", " q", "quit", "Q", "q\nq", "r u ok?"])
    def test_what_is_said_to_the_model(self, commands, message):
        assert not commands[0].is_meant(message)

    def test_system(self, commands):
        found, session = commands
        assert found.run("/system") == "No system prompt."
        found.run("/system import os")
        assert session.conversation.messages("a")[0] == {
            "role": "system",
            "content": "import os",
        }
        say(session, "def area(radius):")
        found.run("/reset")
        assert found.run("/system") == "System prompt: import os"
        assert len(session.conversation) == 0

    def test_save_and_load(self, commands, tmp_path):
        found, session = commands
        path = tmp_path / "said one.json"
        say(session, "def area(radius):")
        messages = session.conversation.messages()
        assert "1 exchange " in found.run(f"/save {path}")
        say(session, "class Stack:")
        found.run(f"/save {path}")  # over its own file
        found.run("/undo")
        found.run(f"/save {path}")
        found.run("/reset")
        found.run(f"/load {path}")
        assert session.conversation.messages() == messages
        with pytest.raises(MTPError, match="empty conversation"):
            [found.run("/undo") for _ in range(2)]

    def test_save_over_something_else(self, commands, tmp_path):
        path = tmp_path / "precious"
        path.write_text("mine")
        with pytest.raises(MTPError, match="holds something else"):
            commands[0].run(f"/save {path}")
        assert path.read_text() == "mine"

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("/foo", "got /foo"),
            ("/", "a command must be one of"),
            ("/stats x", "on or off: got x"),
            ("/temp hot", "temp must be a number: got 'hot'"),
            ("/temp -1", "temp must be 0 or more"),
            ("/top-k 1.5", "top_k must be a whole number: got '1.5'"),
            ("/top-p 2", "top_p must be from 0 to 1"),
            ("/seed none", "a whole number, or off: got 'none'"),
            ("/max-tokens 0", "max_tokens must be 1 or more"),
            ("/thinking x", "on or off: got x"),
            ("/retry x", "stand alone"),
            ("/load /dev/zero", "must be a file that can be read"),
            ("/load ~nobody.here/x", "must be a file that can be read"),
            ("/drafts", "got nothing"),
            ("/drafts 9", "0 to 8: got 9"),
            ("/drafts -1", "got -1"),
            ("/drafts ²", "got ²"),
            ("/undo", "empty conversation"),
            ("/undo 2", "stand alone"),
            ("/reset x", "stand alone"),
            ("/quit x", "stand alone"),
            ("/save", "a file's name"),
            ("/load", "a file's name"),
            ("/load none.json", "must be a file that can be read"),
            ("/save none/x.json", "must be a file that can be written"),
            (f"/save {'x' * 300}", "must be a file that can be written"),
            ("/save a\0b", "null character"),
            ("/load a\0b", "null character"),
            ("/load .", "must be a file that can be read"),
        ],
    )
    def test_mistakes(self, commands, monkeypatch, tmp_path, line, reason):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(MTPError, match=reason) as error:
            commands[0].run(line)
        one_line(error.value)

    def test_a_file_that_is_too_large(self, commands, tmp_path, monkeypatch):
        path = tmp_path / "large"
        with path.open("wb") as file:
            file.truncate(3 * 10**9)
        with pytest.raises(RequestError, match="at most 10 MB: got 3000") as error:
            commands[0].run(f"/load {path}")
        one_line(error.value)
        with pytest.raises(MTPError, match="holds something else"):
            commands[0].run(f"/save {path}")

    def test_a_file_that_is_no_text(self, commands, tmp_path):
        path = tmp_path / "bytes"
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(RequestError, match="UTF-8"):
            commands[0].run(f"/load {path}")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command over typed lines: status, standard output, standard error."""

    def command(typed, *args, is_terminal=False):
        raw = typed if isinstance(typed, bytes) else typed.encode()
        stdin = io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8")
        monkeypatch.setattr(stdin, "isatty", lambda: is_terminal, raising=False)
        monkeypatch.setattr(sys, "stdin", stdin)
        status = chat.main(["--exactness", "fast", *map(str, args)])
        return status, *capsys.readouterr()

    return command


class TestCommand:
    def test_answers_alone_go_to_standard_output(self, run, embedded):
        status, out, err = run("def area(radius):\nclass Stack:\n", "-m", "12")
        session = make_session(embedded)
        said = [say(session, q) for q in ("def area(radius):", "class Stack:")]
        assert (status, out) == (0, "".join(f"{text}\n" for text in said))
        assert "chat template" not in err
        assert err.count("cut off after 12 tokens") == 2
        assert "> " not in err

    def test_says_once_that_there_is_no_template(self, run, folder):
        typed, args = "a\nb\n", ("--model", folder, "-m", "4")
        assert run(typed, *args)[2].count("no chat template") == 1
        assert "chat template" not in run(typed, *args, "--ignore-chat-template")[2]

    def test_says_nothing_of_what_is_loaded(self, run, folder):
        status, _, err = run("a\n", "--model", folder, "--verbose", "f", "-m", "4")
        assert status == 0
        assert "drafter" not in err

    def test_the_template_is_used(self, run, chat_folder, chat_pair):
        args = ("--model", chat_folder, "-m", "6")
        config = ("--chat-template-config", json.dumps(OPENING))
        status, out, err = run("the rain\n", *args, *config)
        session = make_session(chat_pair, config=OPENING, max_tokens=6)
        assert (status, out) == (0, say(session, "the rain") + "\n")
        assert "no chat template" not in err
        assert out != run("the rain\n", *args)[1]
        plain = run("the rain\n", *args, "--ignore-chat-template")[1]
        assert plain not in (out, run("the rain\n", *args)[1])

    def test_a_template_that_refuses(self, run, chat_folder):
        args = ("--model", chat_folder, "--system-prompt", "be brief")
        status, out, err = run("the rain\n", *args)
        assert (status, out) == (1, "")
        assert err.splitlines()[-1].startswith("error: the chat template must take")

    def test_in_a_terminal_a_mistake_is_not_the_end(self, run):
        typed = "/foo\ndef area(radius):\n/quit\nnever\n"
        status, out, err = run(typed, "-m", "4", is_terminal=True)
        assert status == 0
        assert out.count("\n") >= 1
        assert "error: a command must be one of" in err
        assert err.count("> ") == 3
        assert "never" not in out

    def test_in_a_pipe_it_is(self, run):
        status, out, err = run("/foo\ndef area(radius):\n", "-m", "4")
        assert (status, out) == (1, "")
        assert err.splitlines()[-1].startswith("error: a command must be one of")

    def test_stats_after_every_answer(self, run):
        typed = "def a(b):\n/stats off\ndef c(d):\n/stats on\n/stats\n"
        _, _, err = run(typed, "--stats", "-m", "4")
        assert err.count("[4 tokens, ") == 1
        assert "All 2 answers" in err

    def test_lines_that_go_on_and_slashes(self, run, monkeypatch):
        questions = []
        answer = SESSION.Session.answer

        def recorded(self, question, on_progress):
            questions.append(question)
            return answer(self, question, on_progress)

        monkeypatch.setattr(SESSION.Session, "answer", recorded)
        run('def f(a):\\\n    return a\n\n  \n"""\n//x\n"""\n//y\n', "-m", "2")
        assert questions == ["def f(a):\n    return a", "/x", "/y"]

    def test_retry(self, run, embedded):
        """Another answer takes the place of the last one."""
        typed = "def a(b):\n/max-tokens 3\n/retry\n/stats\n/undo\n"
        status, out, err = run(typed, "-m", "6")
        sessions = [make_session(embedded, max_tokens=most) for most in (6, 3)]
        assert status == 0
        assert out == "".join(f"{say(one, 'def a(b):')}\n" for one in sessions)
        assert "(greedy, or of one seed: each try gives the same answer" in err
        assert "All 2 answers" in err

    def test_retry_of_nothing(self, run):
        status, _, err = run("/retry\n", "-m", "6", "--temp", "1")
        assert status == 1
        assert "each try gives the same answer" not in err
        assert "error: the conversation must have an exchange" in err

    def test_retry_that_fails_loses_nothing(self, run, monkeypatch):
        answer = SESSION.Session.answer
        asked = []

        def failing(self, question, on_progress):
            asked.append(question)
            if len(asked) > 1:
                raise RequestError("no")
            return answer(self, question, on_progress)

        monkeypatch.setattr(SESSION.Session, "answer", failing)
        typed = "def a(b):\n/retry\n/undo\nq\n"
        status, _, err = run(typed, "-m", "2", is_terminal=True)
        assert (status, asked) == (0, ["def a(b):", "def a(b):"])
        assert "Dropped: def a(b):" in err

    def test_words_of_mlx_lms_chat(self, run):
        status, out, err = run("def a(b):\nr\nh\nq\nnever\n", "-m", "1")
        assert (status, "never" in out) == (0, False)
        assert "A new conversation.\n" + HELP in err

    def test_input_that_is_not_text(self, run):
        status, out, err = run(b"\xff\n", "-m", "2")
        assert (status, out) == (1, "")
        assert err.splitlines()[-1].startswith("error: a message must be UTF-8 text")

    def test_sampling_of_a_seed(self, run, folder):
        args = ("--model", folder, "-m", "6", "--temp", "2", "--seed")
        texts = [run("the rain\n", *args, seed) for seed in (5, 5, 6)]
        assert texts[0][1] == texts[1][1] != texts[2][1]
        assert "Sampling: temperature 2.0.\n" in texts[0][2]

    def test_penalties_and_bias(self, run, folder):
        args = ("--model", folder, "-m", "3", "--logit-bias", '{"300": 1000}')
        name = tiny_tokenizer().convert_ids_to_tokens([300])[0].replace("▁", " ")
        assert run("the rain\n", *args)[:2] == (0, name * 3 + "\n")

    @pytest.mark.parametrize(
        ("args", "reason"),
        [
            (("--no-draft", "--num-draft-tokens", "2"), "--num-draft-tokens must be 0"),
            (("--num-draft-tokens", "9"), "from 0 to 8"),
            (("-m", "0"), "max_tokens must be 1 or more"),
            (("--temp", "-1"), "temp"),
            (("--what",), "mlx_gemma_mtp.chat --help"),
            (("--stop", ""), "a stop string must hold at least one character"),
        ],
    )
    def test_mistakes(self, run, args, reason):
        status, out, err = run("a\n", *args)
        assert (status, out) == (1, "")
        assert reason in err.splitlines()[-1]

    def test_stop(self, run):
        typed, args = "def area(radius):\n", ("-m", "12")
        text = run(typed, *args)[1]
        assert run(typed, *args, "--stop", text[5:8])[1] == text[:5] + "\n"

    def test_without_a_drafter(self, run):
        typed, args = "def area(radius):\n/stats\n", ("-m", "12")
        _, text, _ = run(typed, *args)
        status, plain, err = run(typed, *args, "--no-draft")
        assert (status, plain) == (0, text)
        assert "Drafts: none" in err


def start(*args, stdin, stdout=subprocess.PIPE):
    """Start the real command in a process of its own."""
    # A shell that starts tests in the background may have switched Control-C off.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from mlx_gemma_mtp.chat.__main__ import main; raise SystemExit(main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "TERM": "dumb"} | PLAIN_GRAPHS,
    )


class TestProcess:
    def test_help_loads_no_model_code(self):
        code = (
            "import sys; from mlx_gemma_mtp.chat.__main__ import configure_parser; "
            "configure_parser().format_help(); assert 'mlx' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

    def test_the_module(self, folder):
        command = [sys.executable, "-m", "mlx_gemma_mtp.chat"]
        result = subprocess.run(
            [*command, "--model", str(folder), "-m", "4"],
            input="the rain\nthe heat\n",
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=os.environ | PLAIN_GRAPHS,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("\n") >= 2

    @pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
    def test_control_c_in_a_pipe(self, endless):
        args = ("--model", endless, "-m", "-1")
        with start(*args, stdin=subprocess.PIPE) as process:
            process.stdin.write(b"the rain\n")
            process.stdin.flush()
            assert process.stdout.read(1)  # it is in the middle of it
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=300)
        assert process.returncode == 130, err
        assert out.endswith(b"\n")
        assert b"Traceback" not in err

    @pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
    def test_a_reader_that_leaves(self, endless):
        args = ("--model", endless, "-m", "-1")
        with start(*args, stdin=subprocess.PIPE) as process:
            process.stdin.write(b"the rain\n")
            process.stdin.flush()
            assert process.stdout.read(1)
            process.stdout.close()
            err = process.stderr.read()
            process.stdin.close()
        assert process.returncode == 141, err
        assert b"Traceback" not in err


def interrupted_mistake():
    """Fails in C before Control-C is noticed, as MLX does whose g++ dies of it."""
    nothing: list[None] = []
    calls = (partial(ctypes.pythonapi.PyErr_SetInterrupt), partial(nothing.pop))
    list(map(partial.__call__, calls))


def test_progress_ends_where_control_c_comes_with_an_error(monkeypatch):
    ended = []

    class Progress:
        def __init__(self, notes):
            pass

        def tell(self, num_read, num_tokens):
            pass

        def end(self):
            ended.append(True)

    class Failing:
        def answer(self, question, on_progress):
            interrupted_mistake()
            yield

    session: Any = Failing()
    monkeypatch.setattr(chat, "PromptProgress", Progress)
    with pytest.raises(KeyboardInterrupt):
        chat._print_answer(session, "x", shows_thoughts=False)
    assert ended


def test_who_leaves_greedy_text_gets_the_checkpoints_filters():
    """As with --temp at the start; what was given stays."""
    defaults = SamplingDefaults({"temperature": 1.0, "top_k": 64, "top_p": 0.95})
    given = {"temp": 0.0, "top_p": 0.5, "top_k": None, "min_p": None}
    greedy = Settings(
        max_tokens=4,
        prefill_step_size=2048,
        exactness="fast",
        stop=(),
        sampling=defaults.settings(**given) | {"seed": 3},
        defaults=defaults,
        given=given,
    )
    assert greedy.value("top_k") == 0
    sampled = greedy.changed("min_p", "0.1").changed("temp", "1")
    assert sampled.sampling == {
        **{"temp": 1.0, "top_p": 0.5, "top_k": 64, "min_p": 0.1},
        "seed": 3,
    }
    assert sampled.changed("seed", "off").value("top_k") == 64
