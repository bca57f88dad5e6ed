"""What the commands do with answers of Gemma's: thoughts, marks, beginnings, <bos>.

Run: python -m pytest tests/cli/test_commands_gemma.py
"""

import importlib
import io
import json
import sys

import pytest

from mlx_gemma_mtp import generate, stream_generate
from mlx_gemma_mtp.cache.kept import KeptCaches
from mlx_gemma_mtp.chat.prompts import TemplatePrompts
from mlx_gemma_mtp.chat.session import Session, Settings
from mlx_gemma_mtp.cli import generate as cli
from mlx_gemma_mtp.pair.load import load
from tests import gemma_pair
from tests.gemma import BOS
from tests.gemma_pair import let_say

pytestmark = [pytest.mark.gemma, pytest.mark.usefixtures("plain_graphs")]

CHAT = importlib.import_module("mlx_gemma_mtp.chat.__main__")
ANSWER = "<|channel>thought\nHm.\n<channel|>Yes.<turn|>"


@pytest.fixture
def say(monkeypatch, gemma_tokenizer):
    """Let commands say answers; the prompts that they were asked."""

    def let(*answers):
        return let_say(monkeypatch, gemma_tokenizer("may-12b"), *answers)

    return let


@pytest.fixture
def run(gemma_pair_folder, monkeypatch, capsys):
    """Run a command with the pair; its status and what it wrote."""

    def run(main, *args, typed="", form="may-12b"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        folder = str(gemma_pair_folder(form))
        fast = ("--model", folder, "--exactness", "fast", "--num-draft-tokens", "2")
        status = main([*fast, "--temp", "0", *args])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def text_of(gemma_tokenizer):
    return gemma_tokenizer("may-12b").decode


class TestGenerate:
    def test_thoughts_are_left_out_of_a_file(self, run, say):
        say(ANSWER)
        assert run(cli.main, "-p", "Why")[:2] == (0, "Yes.\n")
        assert run(cli.main, "-p", "Why", "--show-thoughts")[1] == "Hm.\n\nYes.\n"

    def test_what_is_cut_off_while_thinking_is_said(self, run, say):
        say(ANSWER)
        status, out, err = run(cli.main, "-p", "Why", "-m", "4", "--verbose", "False")
        assert (status, out) == (0, "\n")
        assert err.strip() == (
            "(cut off while thinking, after 4 tokens; see --max-tokens, or --thinking "
            "off)"
        )

    def test_a_thought_is_limited(self, run, say, gemma_tokenizer):
        """The answer goes on with what it would have thought."""
        tokenizer = gemma_tokenizer("may-12b")
        _, *others = tokenizer.encode("Hm.\n", add_special_tokens=False)
        left = tokenizer.decode(others)
        assert left in ("m.\n", ".\n")  # by the tests' vocabulary, and by Gemma's own
        say(ANSWER)
        args = ("-p", "Why", "--show-thoughts", "--max-thinking-tokens")
        assert run(cli.main, *args, "1")[1] == f"{left}Yes.\n"
        assert run(cli.main, *args, "9")[1] == "Hm.\n\nYes.\n"
        status, out, err = run(cli.main, *args, "-1", "--verbose", "False")
        assert (status, out) == (1, "")
        assert "max_thinking_tokens must be 0 or more: got -1." in err

    @pytest.mark.parametrize(
        ("args", "has_thought"),
        [
            ((), True),
            (("--thinking", "on"), True),
            (("--thinking", "off"), False),
            (("--chat-template-config", '{"enable_thinking": false}'), False),
        ],
    )
    def test_thinking(self, run, say, text_of, args, has_thought):
        prompts = say(ANSWER)
        assert run(cli.main, "-p", "Why", *args)[0] == 0
        opening = "" if has_thought else "<|channel>thought\n<channel|>"
        assert text_of(prompts[0]).endswith(f"<|turn>model\n{opening}")
        assert ("<|think|>" in text_of(prompts[0])) is has_thought

    def test_thinking_said_twice(self, run):
        both = ("--thinking", "on", "--chat-template-config", '{"enable_thinking": 1}')
        status, _, err = run(cli.main, "-p", "Why", *both)
        assert status == 1
        assert "--thinking and enable_thinking in --chat-template-config" in err

    @pytest.mark.parametrize(
        "prefill",
        [
            "Because of",
            "```python\n",
            "Because ",
            "  indented",
            "",
            "\n\n",
            "<|channel>thought\nFirst, ",
            "<|channel>thought\nHm.\n<channel|>Because",
        ],
    )
    def test_an_answer_begins_byte_for_byte(self, run, say, text_of, prefill):
        prompts = say("of it.<turn|>")
        status, out, _ = run(cli.main, "-p", "Why", "--prefill-response", prefill)
        assert text_of(prompts[0]).endswith(f"<|turn>model\n{prefill}")
        is_thought = prefill.endswith("First, ")
        assert (status, out) == (0, "\n" if is_thought else "of it.\n")

    @pytest.mark.parametrize(
        ("prompt", "text"),
        [
            ("Why", "<bos>Why"),
            ("<bos>Why", "<bos>Why"),
            ("<bos><bos>Why", "<bos>Why"),
            (" \n<bos>Why", "<bos>Why"),
            (" Why", "<bos> Why"),
            ("", "<bos>"),
        ],
    )
    def test_plain_text_begins_once(self, run, say, text_of, prompt, text):
        prompts = say(ANSWER)
        run(cli.main, "-p", prompt, "--ignore-chat-template")
        assert text_of(prompts[0]) == text

    def test_an_answer_begins_without_a_template_too(self, run, say, text_of):
        prompts = say("of it.<turn|>")
        args = ("--ignore-chat-template", "--prefill-response", " Because")
        assert run(cli.main, "-p", "Why?", *args)[:2] == (0, "of it.\n")
        assert text_of(prompts[0]) == "<bos>Why? Because"

    def test_a_template_without_a_beginning(
        self, run, say, tmp_path, gemma_pair_folder
    ):
        """The package sees to <bos>, whatever a template writes."""
        folder = tmp_path / "pair"
        folder.mkdir()
        for file in gemma_pair_folder("may-12b").iterdir():
            (folder / file.name).symlink_to(file)
        template = folder / "chat_template.jinja"
        text = template.read_text().replace("bos_token", "''")
        template.unlink()
        template.write_text(text)
        prompts = say(ANSWER)
        assert run(cli.main, "-p", "Why", "--model", str(folder))[0] == 0
        assert prompts[0][0] == BOS
        assert BOS not in prompts[0][1:]


@pytest.fixture
def asked(monkeypatch, text_of):
    """The whole prompts of a chat, kept parts included, as text."""
    prompts = []
    find = KeptCaches.find

    def recorded(self, prompt):
        prompts.append(text_of(prompt))
        return find(self, prompt)

    monkeypatch.setattr(KeptCaches, "find", recorded)
    return prompts


class TestChat:
    def test_thoughts_and_marks(self, run, say, asked, tmp_path):
        say(ANSWER, "<|channel>thought\nOh.\n<channel|>No.<turn|>")
        file = tmp_path / "said.json"
        typed = f"Why?\nAnd now?\n/save {file}\n"
        status, out, _ = run(CHAT.main, typed=typed)
        assert (status, out) == (0, "Yes.\nNo.\n")
        # What was thought is not said again.
        assert "<|turn>model\nYes.<turn|>" in asked[1]
        saved = json.loads(file.read_text())["messages"]
        assert [message["content"] for message in saved] == [
            *("Why?", "Yes.", "And now?", "No.")
        ]
        assert [message.get("reasoning") for message in saved] == [
            *(None, "Hm.", None, "Oh.")
        ]
        run(CHAT.main, typed=f"/load {file}\nMore\n")
        assert asked[2].count("<|turn>model\nYes.<turn|>") == 1

    def test_thoughts_that_are_asked_for(self, run, say):
        say(ANSWER)
        assert run(CHAT.main, "--show-thoughts", typed="Why\n")[1] == "Hm.\n\nYes.\n"

    def test_a_cut_in_a_thought_is_said(self, run, say):
        say(ANSWER)
        _, out, err = run(CHAT.main, "-m", "4", typed="Why\n")
        assert out == "\n"
        assert "(cut off while thinking, after 4 tokens; see --max-tokens, or" in err

    def test_plain_text_begins_once(self, run, say, asked):
        say("Yes.<turn|>")
        run(CHAT.main, "--ignore-chat-template", typed="Why\nAnd\n")
        assert asked == ["<bos>Why\n", "<bos>Why\nYes.\nAnd\n"]


@pytest.fixture(scope="module")
def loaded(gemma_pair_folder):
    return load(gemma_pair_folder("may-12b"))


class TestPython:
    def test_a_text_begins_once(self, loaded, say, text_of):
        model, tokenizer = loaded
        prompts = say("a<turn|>")
        for text in ("Why", "<bos>Why"):
            generate(model, tokenizer, text, max_tokens=2, exactness="fast")
            assert text_of(prompts[-1]) == "<bos>Why"
        generate(model, tokenizer, [7, 8], max_tokens=2, exactness="fast")
        assert prompts[-1] == [7, 8]

    def test_a_text_that_goes_on_begins_nothing(self, loaded, say, text_of):
        from mlx_lm.models.cache import make_prompt_cache

        model, tokenizer = loaded
        cache = make_prompt_cache(model)
        prompts = say("a<turn|>")
        for text in ("Why", " not"):
            stream = stream_generate(
                model,
                tokenizer,
                text,
                max_tokens=1,
                exactness="fast",
                prompt_cache=cache,
            )
            assert len(list(stream)) == 1
        assert text_of(prompts[0]) == "<bos>Why"
        assert text_of(prompts[1]) == " not"


def test_an_answer_that_is_stopped_keeps_what_was_held_back(loaded, say):
    """Its end may have been the beginning of a mark."""
    model, tokenizer = loaded
    say("if a <")
    settings = Settings(
        max_tokens=20, prefill_step_size=64, exactness="fast", stop=(), sampling={}
    )
    prompts = TemplatePrompts(tokenizer, {})
    session = Session(model, tokenizer, prompts, settings, num_draft_tokens=0)
    parts = []
    answer = session.answer("Why")
    for said in answer:
        parts += said.parts
        if "<" in said.response.marked_text:
            break
    answer.close()
    assert "".join(part.text for part in [*parts, *session.unsaid]) == "if a <"
    assert session.conversation.messages()[1]["content"] == "if a <"


class TestSpelledMarks:
    """Marks that an answer spells in single characters are text, everywhere."""

    @pytest.fixture
    def spelled(self, monkeypatch, gemma_tokenizer):
        tokenizer = gemma_tokenizer("may-12b")
        text = '<|channel>Hm.<channel|>["<eos>","<tool_call|>"]'
        ids = tokenizer.encode("<|channel>Hm.<channel|>", add_special_tokens=False)
        ids += tokenizer.convert_tokens_to_ids([*'["<eos>","<tool_call|>"]'])
        monkeypatch.setattr(gemma_pair, "_encoded", lambda *_: [*ids, 106])
        return text

    def test_commands(self, run, say, spelled):
        say("")
        expected = '["<eos>","<tool_call|>"]\n'
        assert run(cli.main, "-p", "Why")[1] == expected
        assert run(CHAT.main, typed="Why\n")[1] == expected

    def test_python(self, loaded, say, spelled):
        """The text as it is, marks and all."""
        say("")
        assert generate(loaded[0], loaded[1], "Why", exactness="fast") == spelled
