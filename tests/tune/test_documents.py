"""Training data: files to documents, and one line for everything that is none.

Run: python -m pytest tests/tune/test_documents.py
"""

import io
import json
import sys
from itertools import groupby, islice, product
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp import embedded_pair_path
from mlx_gemma_mtp.errors import DataError, RequestError
from mlx_gemma_mtp.pair.load import load_tokenizer
from mlx_gemma_mtp.tune.data import lines
from mlx_gemma_mtp.tune.data.documents import (
    MIN_REST,
    MIN_TOKENS,
    DocumentReader,
    Lengths,
    is_held_out,
)

BOS, EOS = 2, 1
LENGTHS = Lengths(prompt_tokens=16, max_tokens=24, context=100)
CODE = "def area(radius):\n    return 3 * radius * radius\n\n\n"
# As Gemma's: answers end with a token of their own, and a line end is behind it; an
# answer may be opened in another way than it is written later.
TEMPLATE = (
    "{{ bos_token }}{% if tools %}T{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'odd' %}{{ raise_exception('no odd\nones') }}{% endif %}"
    "[{{ message.role }}]\n"
    "{% for call in message.tool_calls or [] %}"
    "{{ call.function.arguments.items() | list }}{% endfor %}"
    "{{ (message.content + '') | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{{ opening }}{% endif %}"
)
QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because it is."}
TOOL_CALL = {"function": {"name": "f", "arguments": '{"x": 1}'}}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded_pair_path(), {"chat_template": None})


@pytest.fixture(scope="module")
def chat_tokenizer():
    return load_tokenizer(embedded_pair_path(), {"chat_template": TEMPLATE})


@pytest.fixture
def write(tmp_path):
    """Write a file: bytes, text, or records as JSON lines."""

    def written(name, content):
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return written


def read(tokenizer, *paths, generate=False, lengths=LENGTHS, **config):
    reader = DocumentReader(
        tokenizer, lengths, generate=generate, chat_template_config=config
    )
    return list(reader.read(paths))


def fail(tokenizer, *paths, **settings):
    """The one line that reading ends with."""
    with pytest.raises(DataError) as caught:
        read(tokenizer, *paths, **settings)
    message = str(caught.value)
    assert message.splitlines() == [message]
    assert message.endswith(".")
    assert " must " in message
    assert ": got " in message
    return message


def plain(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def pairs(documents):
    return [(document.prompt, document.rest) for document in documents]


def texts(tokenizer, documents):
    """Prompts and rests as text, special tokens included."""
    return [tuple(map(tokenizer.decode, pair)) for pair in pairs(documents)]


class TestPlainText:
    def test_windows_follow_one_another(self, tokenizer, write):
        body = plain(tokenizer, CODE * 8)
        found = read(tokenizer, write("code.py", CODE * 8))
        assert len(body) > 3 * 39
        assert found[0].prompt == [BOS, *body[:15]]
        assert found[0].rest == body[15:39]
        assert found[1].prompt == [BOS, *body[39:54]]
        assert {d.kind for d in found} == {"code"}
        assert all(d.prompt[0] == BOS for d in found)
        whole = [token for d in found for token in [*d.prompt[1:], *d.rest]]
        assert whole == body[: len(whole)]
        assert len(body) - len(whole) < MIN_TOKENS

    def test_windows_of_prompts_alone(self, tokenizer, write):
        body = plain(tokenizer, CODE * 8)
        found = read(tokenizer, write("code.py", CODE * 8), generate=True)
        assert [d.prompt[1:] for d in found[:3]] == [
            body[:15],
            body[15:30],
            body[30:45],
        ]
        assert all(d.rest == [] and len(d.prompt) <= 16 for d in found)

    def test_the_end_is_cut_to_fit(self, tokenizer, write):
        for num_tokens in range(1, 45):
            body = plain(tokenizer, CODE * 8)[:num_tokens]
            path = write("code.py", tokenizer.decode(body))
            assert plain(tokenizer, tokenizer.decode(body)) == body
            if 1 + num_tokens < MIN_TOKENS:
                assert "at least one text of 8 tokens" in fail(tokenizer, path)
                continue
            (*_, last) = read(tokenizer, path)
            assert 2 <= len(last.prompt) <= LENGTHS.prompt_tokens, num_tokens
            assert MIN_REST <= len(last.rest) <= LENGTHS.max_tokens, num_tokens

    def test_the_end_is_cut_to_fit_a_long_prompt(self, tokenizer, write):
        """What follows is never longer than asked for, so the prompt keeps the most."""
        lengths = Lengths(prompt_tokens=40, max_tokens=4, context=44)
        for num_tokens in range(35, 75):
            text = tokenizer.decode(plain(tokenizer, CODE * 8)[:num_tokens])
            (first, *_) = read(tokenizer, write("code.py", text), lengths=lengths)
            assert len(first.prompt) == min(40, 1 + num_tokens - 4), num_tokens
            assert len(first.rest) == min(4, num_tokens + 1 - len(first.prompt))

    def test_a_text_that_has_its_bos(self, tokenizer, write):
        with_bos = read(tokenizer, write("one.txt", "<bos>" + CODE))
        assert pairs(with_bos) == pairs(read(tokenizer, write("two.txt", CODE)))

    def test_a_tokenizer_without_bos(self, write):
        config = {"add_bos_token": False, "bos_token": None}
        tokenizer = load_tokenizer(embedded_pair_path(), config)
        assert tokenizer.bos_token_id is None
        body = tokenizer.encode(CODE * 8, add_special_tokens=False)
        found = read(tokenizer, write("code.py", CODE * 8))
        assert pairs(found)[:2] == [
            (body[:16], body[16:40]),
            (body[40:56], body[56:80]),
        ]

    @pytest.mark.parametrize(
        "content",
        [
            b"\xef\xbb\xbf" + CODE.encode(),
            CODE.replace("\n", "\r\n").encode(),
            CODE.rstrip("\n").encode() + b"\n\n\n",
        ],
    )
    def test_marks_and_line_ends(self, tokenizer, write, content):
        expected = pairs(read(tokenizer, write("plain.txt", CODE)))
        assert pairs(read(tokenizer, write("other.txt", content))) == expected

    def test_nothing_is_lost_between_lines(self, tokenizer, write):
        odd = "a\0b\x0c\x1c\u2028\x85é€😀\ttab " * 4
        (first, *_) = read(tokenizer, write("odd.txt", odd), generate=True)
        assert first.prompt == tokenizer.encode(odd)[:16]

    def test_blocks_are_sources(self, tokenizer, write):
        text = "x = 1\n" * 20_000
        found = read(tokenizer, write("long.txt", text), write("code.py", CODE))
        sources = [d.source for d in found]
        assert sources == sorted(sources)
        assert set(sources) == set(range(sources[-1] + 1))
        assert len(set(sources)) == 1 + len(text) // (16 * 2**10) + 1
        assert {d.kind for d in found if d.source == sources[-1]} == {"code"}

    def test_a_long_line_is_cut(self, tokenizer, write):
        found = read(tokenizer, write("one-line.txt", "ab " * 20_000), generate=True)
        assert len({d.source for d in found}) == 4

    def test_no_false_alarm_of_transformers(self, tokenizer, write, caplog):
        """Its limit is the training's; a block of text has more tokens than that."""
        tokenizer.deprecation_warnings.clear()
        assert read(tokenizer, write("long.txt", "x = 1\n" * 2000))
        assert "indexing errors" not in caplog.text
        assert not tokenizer.deprecation_warnings


class TestRecords:
    def test_kinds_and_sources(self, tokenizer, write):
        first = write(
            "mixed.jsonl", [{"text": CODE * 9, "kind": "code"}, {"text": CODE}]
        )
        second = write("other.JSONL", [{"prompt": "a", "completion": "b c"}])
        found = read(tokenizer, first, second)
        kinds = [(key, len(list(ds))) for key, ds in groupby(found, lambda d: d.kind)]
        assert [kind for kind, _ in kinds] == ["code", "mixed", "other"]
        assert kinds[0][1] > 2  # windows of one source
        assert [d.source for d in found] == [0] * kinds[0][1] + [1, 2]

    def test_text_is_as_in_a_plain_file(self, tokenizer, write):
        record = read(tokenizer, write("a.jsonl", [{"text": CODE * 9}]))
        assert pairs(record) == pairs(read(tokenizer, write("a.txt", CODE * 9)))

    def test_blank_lines_marks_and_line_ends(self, tokenizer, write):
        line = json.dumps({"text": CODE, "kind": None, "other": [1, None]})
        content = f"\ufeff\r\n{line}\r\n \t\r\n\n{line}"
        found = read(tokenizer, write("a.jsonl", content))
        assert {d.source for d in found} == {0, 1}

    def test_odd_json_that_is_read(self, tokenizer, write):
        line = '{"text": "no", "n": NaN, "m": -Infinity, "text": ' + json.dumps(CODE)
        found = read(tokenizer, write("a.jsonl", line + "}"))
        assert pairs(found) == pairs(read(tokenizer, write("a.txt", CODE)))

    def test_raw_prompts(self, tokenizer, write):
        path = write("a.jsonl", [{"prompt": "def f(", "completion": "x):\n  pass"}])
        prompt = [BOS, *plain(tokenizer, "def f(")]
        rest = [*plain(tokenizer, "x):\n  pass"), EOS]
        assert pairs(read(tokenizer, path)) == [(prompt, rest)]
        assert pairs(read(tokenizer, path, generate=True)) == [(prompt, [])]

    def test_prompts_through_the_template(self, chat_tokenizer, write):
        path = write("a.jsonl", [{"prompt": "Why?", "completion": "So."}])
        prompt = "<bos>[user]\nWhy?<eos>\n[assistant]\n"
        found = texts(chat_tokenizer, read(chat_tokenizer, path))
        assert found == [(prompt, "So.<eos>")]
        found = read(chat_tokenizer, path, generate=True)
        assert texts(chat_tokenizer, found) == [(prompt, "")]

    def test_a_conversation_beside_its_prompt(self, chat_tokenizer, write):
        record = {"prompt": "other", "messages": [QUESTION, ANSWER], "text": "x"}
        path = write("a.jsonl", [record, {**record, "completion": "x y"}])
        first, second = texts(chat_tokenizer, read(chat_tokenizer, path))
        assert "Why?" in first[0]
        assert "other" in second[0]

    def test_documents_of_one_source_are_held_out_together(self, tokenizer, write):
        path = write("a.jsonl", [{"text": CODE * 9}] * 40)
        found = read(tokenizer, path)
        held = {d.source for d in found if is_held_out(d.source, every=10)}
        assert 2 <= len(held) <= 6
        assert sum(d.source in held for d in found) > 2 * len(held)


class TestConversations:
    def test_the_last_answer_is_the_rest(self, chat_tokenizer, write):
        messages = [QUESTION, ANSWER, {"role": "user", "content": "And?"}]
        path = write("a.jsonl", [{"messages": [*messages, ANSWER]}])
        prompt = (
            "<bos>[user]\nWhy?<eos>\n[assistant]\nBecause it is.<eos>\n"
            "[user]\nAnd?<eos>\n[assistant]\n"
        )
        found = texts(chat_tokenizer, read(chat_tokenizer, path))
        assert found == [(prompt, "Because it is.<eos>")]
        found = texts(chat_tokenizer, read(chat_tokenizer, path, generate=True))
        assert found == [(prompt, "")]

    def test_a_question_at_the_end(self, chat_tokenizer, write):
        path = write("a.jsonl", [{"messages": [QUESTION, ANSWER, QUESTION]}])
        ((prompt, rest),) = texts(chat_tokenizer, read(chat_tokenizer, path))
        assert prompt == "<bos>[user]\nWhy?<eos>\n[assistant]\n"
        assert rest == "Because it is.<eos>"
        ((prompt, _),) = texts(
            chat_tokenizer, read(chat_tokenizer, path, generate=True)
        )
        assert prompt.count("Why?") == 2

    @pytest.mark.parametrize(
        "answer", ["assistant", "<b>", "[", "eos>", "\n\nx\n", "é"]
    )
    def test_an_answer_that_is_opened_in_another_way(
        self, chat_tokenizer, write, answer
    ):
        record = {"messages": [QUESTION, {"role": "assistant", "content": answer}]}
        path = write("a.jsonl", [record])
        found = read(chat_tokenizer, path, opening="<thought>\n")
        prompt = "<bos>[user]\nWhy?<eos>\n[assistant]\n<thought>\n"
        assert texts(chat_tokenizer, found) == [(prompt, answer.strip() + "<eos>")]

    def test_a_prompt_is_that_of_decoding_whatever_follows(self, write):
        """Apart, since the space of the prompt would join the answer's first word."""
        template = TEMPLATE.replace("]\n", "] ")
        tokenizer = load_tokenizer(embedded_pair_path(), {"chat_template": template})
        answer = {"role": "assistant", "content": "return x"}
        ((prompt, rest),) = pairs(
            read(tokenizer, write("a.jsonl", [{"messages": [QUESTION, answer]}]))
        )
        asked = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([QUESTION, answer])
        assert prompt == asked
        assert whole[: len(asked)] != asked
        assert tokenizer.decode(rest) == "return x<eos>"

    def test_tools_and_their_calls(self, chat_tokenizer, write):
        call = {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}
        empty = {**call, "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}
        result = {"role": "tool", "content": "1"}
        messages = [QUESTION, call, result, empty, result, ANSWER]
        record = {"messages": messages, "tools": [{"a": 1}]}
        ((prompt, _),) = texts(
            chat_tokenizer, read(chat_tokenizer, write("a.jsonl", [record]))
        )
        assert prompt == (
            "<bos>T[{\"a\": 1}]\n[user]\nWhy?<eos>\n[assistant]\n[('x', 1)]<eos>\n"
            "[tool]\n1<eos>\n[assistant]\n[]<eos>\n[tool]\n1<eos>\n[assistant]\n"
        )

    def test_arguments_of_the_template(self, chat_tokenizer, write):
        path = write("a.jsonl", [{"messages": [QUESTION]}])
        found = read(chat_tokenizer, path, generate=True, opening="Well,")
        assert texts(chat_tokenizer, found)[0][0].endswith("[assistant]\nWell,")


def chat(*messages, **more):
    return {"messages": list(messages), **more}


class TestMistakes:
    """One line each: file, line, what it must be, what it is, what to do."""

    def test_no_such_file(self, tokenizer, tmp_path):
        path = tmp_path / "none.jsonl"
        assert fail(tokenizer, path) == (
            f"{path}: the data must be a file that can be read: got No such file or "
            "directory. Check the path and its permissions."
        )

    def test_a_folder(self, tokenizer, tmp_path):
        assert fail(tokenizer, tmp_path) == (
            f"{tmp_path}: the data must be a file: got a folder. Name the files in it, "
            f"such as {tmp_path}/*.jsonl."
        )

    @pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\ud800"])
    def test_a_name_that_no_file_has(self, tokenizer, tmp_path, name):
        assert "a file that can be read" in fail(tokenizer, tmp_path / name)

    @pytest.mark.skipif(sys.platform != "linux", reason="a file that cannot be read")
    def test_unreadable(self, tokenizer):
        assert "Input/output error" in fail(tokenizer, "/proc/self/mem")

    @pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
    @pytest.mark.parametrize("content", ["", "\n \n\r\n", "\ufeff"])
    def test_nothing_there(self, tokenizer, write, name, content):
        path = write(name, content)
        assert fail(tokenizer, write("b.txt", CODE), path) == (
            f"{path}: the data must be at least one text of 8 tokens: got none. Leave "
            "the file out."
        )

    @pytest.mark.parametrize(
        ("name", "content"), [("a.txt", "x = 1"), ("a.jsonl", '{"text": "x = 1"}')]
    )
    def test_too_short(self, tokenizer, write, name, content):
        assert "got only shorter ones" in fail(tokenizer, write(name, content))

    @pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
    @pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
    def test_not_utf8(self, tokenizer, write, name, mark):
        first = mark + json.dumps({"text": "é" * 30}, ensure_ascii=False).encode()
        path = write(name, first + b"\n" + b'{"text": "caf\xe9"}')
        offset = len(first) + 1 + len(b'{"text": "caf')
        assert fail(tokenizer, path) == (
            f"{path}, line 2: the text must be UTF-8: got byte 0xe9 at offset {offset} "
            "of the file. Convert the file first, for example with iconv."
        )

    @pytest.mark.parametrize("content", [CODE.encode("utf-16"), b"PK\x03\x04\xff\xfe"])
    def test_no_text_at_all(self, tokenizer, write, content):
        assert "line 1: the text must be UTF-8" in fail(
            tokenizer, write("a.txt", content)
        )

    @pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
    def test_one_endless_line(self, tokenizer, tmp_path, monkeypatch, name):
        """No more of it is read than a line may have."""
        path = tmp_path / name
        with path.open("wb") as file:
            file.write(b"\n" * 3)
            file.truncate(20 * 2**20)
        opened = []

        class Counted(io.FileIO):
            num_read = 0

            def readinto(self, buffer):
                num = super().readinto(buffer)
                self.num_read += num
                return num

        def counted(path, mode):
            opened.append(Counted(path, mode))
            return io.BufferedReader(opened[-1])

        monkeypatch.setattr(Path, "open", counted)
        assert fail(tokenizer, path) == (
            f"{path}, line 4: the line must be 4,194,304 bytes or shorter: got a "
            "longer one. Cut it into several lines, or leave the file out."
        )
        (file,) = opened
        assert file.closed
        assert file.num_read <= lines.MAX_LINE_BYTES + 2 * io.DEFAULT_BUFFER_SIZE

    def test_the_longest_line_is_read(self, tokenizer, write, monkeypatch):
        monkeypatch.setattr(lines, "MAX_LINE_BYTES", 100)
        assert read(tokenizer, write("a.txt", "a b " * 24 + "abc\n" + CODE))
        assert "line 1: the line must be 100 bytes" in fail(
            tokenizer, write("a.txt", "a b " * 24 + "abcd\n" + CODE)
        )

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("{'text': 1}", "a JSON object: got Expecting property name"),
            ('{"text": "x', "got Unterminated string starting at column 10"),
            ('{"text": "x"} y', "got Extra data at column 15"),
            ("[1]", "a JSON object: got [1]"),
            ("null", "a JSON object: got nothing"),
            ("[" * 100_000, "a JSON object: got maximum recursion depth"),
            ('{"text":' * 100_000, "a JSON object: got maximum recursion depth"),
            ('{"n": ' + "9" * 5000 + "}", "a JSON object: got Exceeds the limit"),
            ("{}", "got an empty one"),
            ('{"conversations": []}', "got the keys ['conversations']"),
            ('{"text": 5}', "the text must be a string: got 5"),
            ('{"text": ["a"]}', "the text must be a string: got ['a']"),
            (
                '{"text": " \\n"}',
                "the text must be a string with text: got an empty one",
            ),
            ('{"text": "\\ud800 a b c d e f g h"}', "got half of a surrogate pair"),
            ('{"prompt": {}}', "the prompt must be a string: got {}"),
            (
                '{"prompt": ""}',
                "the prompt must be a string with text: got an empty one",
            ),
            ('{"prompt": "a"}', 'beside a "completion"'),
            ('{"prompt": "\\udc00", "completion": "a"}', "half of a surrogate"),
            ('{"prompt": "a", "completion": "\\udc00"}', "half of a surrogate"),
            (
                '{"prompt": "a", "completion": 1}',
                "the completion must be a string: got 1",
            ),
            (
                '{"prompt": "a", "completion": ""}',
                "the completion must be a string with text: got an",
            ),
            ('{"text": "a", "kind": 1}', "the kind must be a printable name"),
            ('{"text": "a", "kind": "a\\nb"}', "the kind must be a printable name"),
            ('{"text": "a", "kind": " "}', "the kind must be a printable name"),
            (json.dumps({"text": "a", "kind": "x" * 65}), "at most 64 characters"),
        ],
    )
    def test_a_line_that_is_no_record(self, tokenizer, write, line, expected):
        good = json.dumps({"text": CODE})
        path = write("a.jsonl", f"{good}\n\n{line}\n{good}\n")
        message = fail(tokenizer, path)
        assert message.startswith(f"{path}, line 3: ")
        assert expected in message
        assert len(message) < len(str(path)) + 300

    def test_nesting_up_to_the_limit(self, tokenizer, write):
        """What can be parsed may be too deep to be shown."""
        for depth in range(300, 1100, 25):
            path = write("a.jsonl", "[" * depth + "]" * depth)
            assert "must be a JSON object" in fail(tokenizer, path), depth

    @pytest.mark.parametrize(
        ("record", "expected"),
        [
            (chat(), "the messages must be at least one: got none"),
            ({"messages": "hello"}, "the messages must be a list: got 'hello'"),
            (chat("hello"), "a message must be an object such as"),
            (chat({"content": "a"}), "a message must be an object such as"),
            (chat({"role": 1, "content": "a"}), "a message must be an object such as"),
            (chat({"role": "user"}), "the content of a message must be a string"),
            (chat({"role": "user", "content": [{}]}), "content of a message must be"),
            (chat(QUESTION, ANSWER, tools={}), "the tools must be a list: got {}"),
            (chat(QUESTION), "a question before an answer: got no answer"),
            (chat(ANSWER), "a question before an answer: got an answer alone"),
            (
                chat({"role": "odd", "content": ""}, ANSWER),
                "the chat template must take this prompt: got no odd ones. Mend or",
            ),
            (
                chat(QUESTION, {**ANSWER, "tool_calls": [5]}),
                "a tool call must be an object such as",
            ),
            (
                chat(QUESTION, {**ANSWER, "tool_calls": {}}),
                "the tool_calls must be a list: got {}",
            ),
            (
                chat(
                    QUESTION,
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"arguments": "{"}}],
                    },
                ),
                "the arguments of a tool call must be a JSON object: got Expecting",
            ),
            (
                chat(QUESTION, {"role": "assistant", "content": "\ud800"}),
                "half of a surrogate pair",
            ),
            (
                chat({"role": "user", "content": "a " * 90}, ANSWER),
                "no longer than the context of 100 tokens: got ",
            ),
        ],
    )
    def test_a_conversation_that_is_none(self, chat_tokenizer, write, record, expected):
        path = write("a.jsonl", [chat(QUESTION, ANSWER), record])
        message = fail(chat_tokenizer, path)
        assert message.startswith(f"{path}, line 2: ")
        assert expected in message

    def test_an_answer_alone_is_no_prompt(self, chat_tokenizer, write):
        path = write("a.jsonl", [chat(ANSWER)])
        message = fail(chat_tokenizer, path, generate=True)
        assert "a question before an answer: got an answer alone" in message

    @pytest.mark.parametrize("generate", [True, False])
    def test_no_chat_template(self, tokenizer, write, generate):
        path = write("a.jsonl", [chat(QUESTION, ANSWER)])
        assert fail(tokenizer, path, generate=generate) == (
            f'{path}, line 1: the record must be a {{"prompt": ...}} or {{"text": '
            "...}: got messages, for a target that has no chat template. Write it so, "
            "or take a checkpoint with a chat template."
        )

    @pytest.mark.parametrize("opening", ["", "<thought>"])
    def test_a_template_that_hides_answers(self, write, opening):
        template = (
            "{% if messages | length == 1 or add_generation_prompt %}one{% else %}"
        )
        config = {"chat_template": template + "two{% endif %}{{ opening }}"}
        tokenizer = load_tokenizer(embedded_pair_path(), config)
        path = write("a.jsonl", [chat(QUESTION, ANSWER)])
        message = fail(tokenizer, path, opening=opening)
        assert "line 1: the last answer must be what the chat template" in message

    def test_calls_that_are_opened_in_another_way(self, chat_tokenizer, write):
        answer = {"role": "assistant", "tool_calls": [TOOL_CALL]}
        path = write("a.jsonl", [chat(QUESTION, answer)])
        ((_, rest),) = texts(chat_tokenizer, read(chat_tokenizer, path))
        assert rest == "[('x', 1)]<eos>"
        message = fail(chat_tokenizer, path, opening="<thought>")
        assert "the last answer must be" in message

    def test_an_answer_of_nothing(self, write):
        template = TEMPLATE.replace("{{ eos_token }}\n", "")
        tokenizer = load_tokenizer(embedded_pair_path(), {"chat_template": template})
        answer = {"role": "assistant", "content": ""}
        message = fail(tokenizer, write("a.jsonl", [chat(QUESTION, answer)]))
        assert "the answer must be at least 2 tokens" in message
        assert ": got none." in message

    @pytest.mark.parametrize("more", [0, 1])
    def test_longer_than_the_context(self, tokenizer, write, more):
        """At the limit and one past it, with an answer and with one to come."""
        prompt = tokenizer.decode(plain(tokenizer, CODE * 8)[: 100 - 24 - 1 + more])
        path = write("a.jsonl", [{"prompt": prompt, "completion": "x " * 11 + "x"}])
        num_rest = len(plain(tokenizer, "x " * 11 + "x")) + 1
        lengths = Lengths(16, 24, context=100 - 24 + num_rest)
        if more:
            assert (
                "the record must be no longer than the context of 100 tokens: got 77 "
                "tokens of prompt and 24 to generate. Shorten or remove it, or "
                "generate fewer tokens."
            ) in fail(tokenizer, path, generate=True)
            assert (
                f"got 77 tokens of prompt and {num_rest} of answer. Shorten or remove "
                "it."
            ) in fail(tokenizer, path, lengths=lengths)
        else:
            assert read(tokenizer, path, generate=True)
            assert read(tokenizer, path, lengths=lengths)

    @pytest.mark.parametrize(
        "lengths", [(7, 24, 100), (16, 1, 100), (60, 41, 100), (-1, -1, -1)]
    )
    def test_lengths_that_do_not_fit(self, lengths):
        with pytest.raises(RequestError, match="must be"):
            Lengths(*lengths)


class TestStreaming:
    @pytest.mark.parametrize(
        ("name", "line"),
        [("a.jsonl", json.dumps({"text": CODE}) + "\n"), ("a.txt", "x = 1\n" * 9000)],
    )
    def test_what_comes_later_is_not_read_yet(self, tokenizer, write, name, line):
        path = write(name, line.encode() * 9 + b"\xff")
        reader = DocumentReader(tokenizer, LENGTHS, generate=False)
        documents = reader.read([path, "no such file"])
        assert len(list(islice(documents, 5))) == 5
        with pytest.raises(DataError, match="UTF-8"):
            list(documents)

    def test_a_second_pass_is_the_same(self, tokenizer, write):
        path = write("a.txt", CODE * 50)
        reader = DocumentReader(tokenizer, LENGTHS, generate=False)
        assert list(reader.read([path])) == list(reader.read([path]))


class TestHoldingOut:
    def test_kinds_that_take_turns_are_held_out_alike(self):
        for every, period in product([2, 3, 5, 10, 20, 50], [1, 2, 3, 5, 8, 10]):
            num = 2000 // period
            for first in range(period):
                sources = range(first, 2000, period)
                held = sum(is_held_out(s, every=every) for s in sources)
                assert abs(held - num / every) <= 4, (every, period)

    @pytest.mark.parametrize("every", [2, 5, 10, 20, 50])
    def test_few_sources_have_one(self, every):
        """Also a little data is judged, and not all of it."""
        assert any(is_held_out(s, every=every) for s in range(every))
        assert not is_held_out(0, every=every)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def is_document(document, generate):
    return (
        len(document.prompt) >= 1
        and (len(document.rest) >= MIN_REST) != generate
        and len(document.prompt) + len(document.rest) <= LENGTHS.context
        and all(isinstance(t, int) for t in [*document.prompt, *document.rest])
    )


def check(tokenizer, path, *, generate):
    """Documents or a DataError come out, nothing else."""
    message = None
    try:
        found = read(tokenizer, path, generate=generate)
    except DataError as error:
        found, message = [], str(error)
    assert all(is_document(document, generate) for document in found)
    assert (message is None) == bool(found)
    assert message is None or message.startswith(str(path))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text(st.characters(codec=None), max_size=40),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "odd"]) | JSON,
        "content": st.text(max_size=40) | JSON,
    },
    optional={"tool_calls": JSON | st.just([TOOL_CALL])},
)
RECORD = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(MESSAGE, max_size=4) | JSON,
        "prompt": st.text(max_size=40) | JSON,
        "completion": st.text(max_size=40) | JSON,
        "text": st.text(max_size=200) | JSON,
        "kind": st.just("a") | JSON,
        "tools": JSON,
    },
)
FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


class TestFuzz:
    @FUZZ
    @given(data=st.binary(max_size=300), generate=st.booleans())
    def test_bytes(self, tokenizer, fuzzed, data, generate):
        for name in ("bytes.txt", "bytes.jsonl"):
            path = fuzzed / name
            path.write_bytes(data)
            check(tokenizer, path, generate=generate)

    @FUZZ
    @given(text=st.text(max_size=300), generate=st.booleans())
    def test_text(self, tokenizer, fuzzed, text, generate):
        path = fuzzed / "text.txt"
        path.write_bytes(text.encode())
        check(tokenizer, path, generate=generate)

    @FUZZ
    @given(
        records=st.lists(RECORD, min_size=1, max_size=3),
        generate=st.booleans(),
        has_template=st.booleans(),
    )
    def test_records(
        self, tokenizer, chat_tokenizer, fuzzed, records, generate, has_template
    ):
        path = fuzzed / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        check(chat_tokenizer if has_template else tokenizer, path, generate=generate)

    @FUZZ
    @given(data=st.data())
    def test_a_damaged_record(self, chat_tokenizer, fuzzed, data):
        line = json.dumps(chat(QUESTION, ANSWER, kind="a")).encode()
        place = data.draw(st.integers(0, len(line) - 1))
        path = fuzzed / "damaged.jsonl"
        path.write_bytes(
            line[:place] + data.draw(st.binary(max_size=2)) + line[place + 1 :]
        )
        check(chat_tokenizer, path, generate=data.draw(st.booleans()))
