"""The server's connections: heads, methods, names of requests, lines in the log.

Run: python -m pytest tests/server/test_wire.py
"""

from __future__ import annotations

import io
import json
import logging
import re
import socket
from email import message_from_bytes

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.server import request_log
from mlx_gemma_mtp.server.app import ENDPOINTS, POSTED
from mlx_gemma_mtp.server.protocol import MAX_HEAD_BYTES
from mlx_gemma_mtp.server.request_log import FORMAT, ID_HEADER, Sparing, WithRequest
from tests.server.serving import (
    WAIT_S,
    ScriptedDecoder,
    echo,
    scripted_means,
    scripted_server,
    wait_until,
)

BODY = b'{"prompt": "a", "max_tokens": 1}'
POST = (
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
    b"content-type: application/json\r\n"
)
GETS = [*sorted(ENDPOINTS - POSTED), "/v1/models/embedded"]


@pytest.fixture(scope="module")
def client():
    with scripted_server(scripted_means(ScriptedDecoder(echo))) as (client, _):
        yield client


@pytest.fixture
def log():
    """What the server says while a test runs, with every kind of line once more."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.addFilter(WithRequest())
    handler.setFormatter(logging.Formatter(FORMAT))
    root, own = logging.getLogger(), logging.getLogger("mlx_gemma_mtp")
    level = own.level
    connections = logging.getLogger("mlx_gemma_mtp.server.connections")
    before = list(connections.filters)
    connections.filters[:] = [Sparing()]
    root.addHandler(handler)
    own.setLevel(logging.DEBUG)
    yield text
    own.setLevel(level)
    root.removeHandler(handler)
    connections.filters[:] = before


def answers(client, *pieces):
    """What comes back for pieces of a request until the server closes: raw bytes."""
    with socket.create_connection(("127.0.0.1", client.port), WAIT_S) as opened:
        for piece in pieces:
            opened.sendall(piece)
        return opened.makefile("rb").read()


def split(answer):
    """Status, headers and body of one raw answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    line, _, fields = head.partition(b"\r\n")
    return int(line.split()[1]), message_from_bytes(fields), body


def error_of(body):
    return json.loads(body)["error"]["message"]


class TestHeads:
    @pytest.mark.parametrize("version", [b"1.1", b"1.0"])
    def test_two_ends_of_a_body_are_one_too_many(self, client, version):
        """Or a proxy could take for a second request what is the first one's body."""
        head = POST.replace(b"1.1", version)
        smuggled = b"0\r\n\r\nGET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
        fields = b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n"
        status, headers, body = split(answers(client, head + fields + smuggled))
        assert (status, headers["connection"]) == (400, "close")
        assert "got both" in error_of(body)

    def test_chunks_need_a_version_that_has_them(self, client):
        head = POST.replace(b"1.1", b"1.0") + b"transfer-encoding: chunked\r\n\r\n"
        status, _, body = split(answers(client, head + b"0\r\n\r\n"))
        assert status == 400
        assert "got 1.0" in error_of(body)

    @pytest.mark.parametrize("place", ["value", "name", "line", "fields"])
    @pytest.mark.parametrize("too_many", [0, 1])
    def test_one_limit_for_all_of_a_head(self, client, place, too_many):
        line, end = (
            b"GET /health?",
            b" HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n",
        )
        room = MAX_HEAD_BYTES - len(line) - len(end) + too_many
        if place == "line":
            head = line + b"q" * room + end
        else:
            fields = {
                "value": b"x: %s\r\n" % (b"y" * (room - 5)),
                "name": b"%s: y\r\n" % (b"x" * (room - 5)),
                "fields": b"x:  \r\n" * (room // 6 - 1)
                + b"z:%s\r\n" % (b" " * (room % 6 + 2)),
            }[place]
            head = (line + end).replace(b"host", fields + b"host")
        assert len(head) == MAX_HEAD_BYTES + too_many
        expected = 431 if too_many else 200
        assert split(answers(client, head))[0] == expected
        # However it arrives.
        pieces = [head[i : i + 5000] for i in range(0, len(head), 5000)]
        assert split(answers(client, *pieces))[0] == expected

    def test_a_head_that_does_not_end(self, client):
        status, headers, body = split(
            answers(client, b"GET / HTTP/1.1\r\nx: ", b"y" * MAX_HEAD_BYTES)
        )
        assert (status, headers["connection"]) == (431, "close")
        assert f"at most {MAX_HEAD_BYTES} bytes" in error_of(body)

    def test_an_answer_on_its_way_stays_whole(self, client):
        """A body that goes wrong after its answer has begun gets no second one."""
        head = POST.replace(b"application/json", b"text/plain")
        chunked = b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"
        found = answers(client, head + chunked, b"no chunk at all\r\n\r\n")
        assert found.startswith(b"HTTP/1.1 4")

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(
            st.one_of(
                st.binary(max_size=20),
                st.sampled_from(
                    [
                        b"GET / HTTP/1.1\r\n",
                        b"POST /v1/completions HTTP/1.1\r\n",
                        b"content-length: 2\r\n",
                        b"content-length: -1\r\n",
                        b"transfer-encoding: chunked\r\n",
                        b"transfer-encoding: gzip\r\n",
                        b"host: localhost\r\n",
                        b"content-type: application/json\r\n",
                        b"upgrade: websocket\r\nconnection: upgrade\r\n",
                        b"expect: 100-continue\r\n",
                        b"x-request-id: \xff\r\n",
                        b"{}",
                        b"2\r\n{}\r\n0\r\n\r\n",
                        b"\r\n",
                    ]
                ),
            ),
            max_size=8,
        )
    )
    def test_bytes_of_every_kind(self, client, pieces):
        with socket.create_connection(("127.0.0.1", client.port), WAIT_S) as opened:
            opened.sendall(b"".join(pieces))
            opened.shutdown(socket.SHUT_WR)
            found = opened.makefile("rb").read()
        statuses = re.findall(rb"^HTTP/1.1 (\d)\d\d ", found, flags=re.MULTILINE)
        assert set(statuses) <= {b"1", b"2", b"4"} or b"HTTP/1.1 501 " in found


class TestMethods:
    @pytest.mark.parametrize("path", GETS)
    def test_head_is_get_without_a_body(self, client, path):
        whole, head = client.get(path), client.ask("HEAD", path)
        assert (whole.status, head.status, head.body) == (200, 200, b"")
        for response in (whole, head):
            response.headers.pop(ID_HEADER)
            response.headers.pop("request-id")
            response.headers.pop("date")
        if path in ("/metrics", "/stats"):  # which tell the asking, and the time
            whole.headers["content-length"] = head.headers["content-length"]
        assert whole.headers == head.headers

    @pytest.mark.parametrize("path", [*GETS, *sorted(POSTED)])
    @pytest.mark.parametrize(
        "method", ["DELETE", "PUT", "PATCH", "OPTIONS", "TRACE", "X"]
    )
    def test_other_methods(self, client, path, method):
        response = client.ask(method, path)
        assert response.status == 405
        allowed = "POST" if path in POSTED else "GET, HEAD"
        assert response.headers["allow"] == allowed
        assert response.message.startswith(f"{method} {path}: ")

    def test_a_method_is_looked_at_before_a_body(self, client):
        for path in GETS:
            response = client.ask("POST", path, b"no JSON", content_type="text/plain")
            assert (response.status, response.headers["allow"]) == (405, "GET, HEAD")
        for path in POSTED:
            response = client.get(path)
            assert (response.status, response.headers["allow"]) == (405, "POST")
            assert client.ask("HEAD", path).status == 405
        response = client.ask("POST", "/nothing", b"no JSON", content_type="text/plain")
        assert response.status == 404


class TestNames:
    @pytest.mark.parametrize(
        "given", ["a", "req_12.3-4:5/6+7=", "x" * 128, "Root=1-67891233-abcdef01"]
    )
    def test_a_harmless_name_is_kept(self, client, given):
        for path in ("/health", "/nothing", "/v1/completions"):
            assert client.get(path, x_request_id=given).headers[ID_HEADER] == given

    @pytest.mark.parametrize("given", ["", " ", "x" * 129, "a b", "ä", "a;b", "a\tb"])
    def test_others_are_replaced(self, client, given):
        found = client.get("/health", x_request_id=given).headers[ID_HEADER]
        assert re.fullmatch("[0-9a-f]{24}", found)

    def test_every_answer_has_its_own(self, client):
        responses = [
            client.get("/health"),
            client.complete(3),
            client.complete(max_tokens=1),
            client.complete(max_tokens=1, stream=True),
            client.get("/v1/models", host="evil.example"),
            client.ask("POST", "/v1/completions", b"", content_type="x"),
        ]
        names = [response.headers[ID_HEADER] for response in responses]
        for request in (b"\x16\x03\x01\r\n\r\n", b"x" * 2 * MAX_HEAD_BYTES):
            names.append(split(answers(client, request))[1][ID_HEADER])
        assert len(set(names)) == len(names)
        assert all(names)

    def test_pages_elsewhere_may_read_it(self):
        means = scripted_means(ScriptedDecoder(echo))
        with scripted_server(means, "--allowed-origins", "https://a.b") as (client, _):
            response = client.get("/health", origin="https://a.b")
            assert response.headers["access-control-expose-headers"] == ID_HEADER


class TestLog:
    def test_lines_name_client_and_request(self, client, log):
        client.complete(max_tokens=1)
        client.ask("POST", "/v1/completions", BODY, x_request_id="mine")
        wait_until(lambda: log.getvalue().count("/v1/completions") == 2)
        for line in log.getvalue().splitlines():
            assert re.search(r" INFO 127\.0\.0\.1:\d+ \S+ /v1/completions 200 in", line)
        assert " mine /v1/completions 200 in " in log.getvalue()

    def test_what_goes_wrong_is_told_with_the_request(self, log):
        decoder = ScriptedDecoder(echo)
        with scripted_server(scripted_means(decoder)) as (client, parts):
            prompt = parts.desk.prompts.of_text("a b").tokens
            decoder.row_errors[tuple(prompt)] = RuntimeError("odd")
            response = client.ask(
                "POST", "/v1/completions", {"prompt": "a b"}, x_request_id="mine"
            )
            assert response.status == 500
        assert re.search(
            r"ERROR 127\.0\.0\.1:\d+ mine a request has failed", log.getvalue()
        )

    @pytest.mark.parametrize(
        ("request_", "said"),
        [
            (b"\x16\x03\x01\r\n\r\n", "400: a request must be HTTP"),
            (b"x" * 2 * MAX_HEAD_BYTES, "431: a request's line and headers"),
            (
                b"GET /nothing HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\n"
                b"upgrade: websocket\r\n\r\n",
                "an upgrade was asked for",
            ),
        ],
    )
    def test_the_same_warning_is_not_repeated(self, client, log, request_, said):
        end = b"GET / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"
        for _ in range(20):
            answers(client, request_ + end)
        warnings = [line for line in log.getvalue().splitlines() if "WARN" in line]
        assert len(warnings) == 1
        assert re.search(rf" WARNING 127\.0\.0\.1:\d+ \S+ {said}", warnings[0])
        assert "pip install" not in log.getvalue()

    def test_a_later_warning_tells_how_many_there_were(self, monkeypatch):
        sparing = Sparing()
        now = 0.0
        monkeypatch.setattr(request_log.time, "monotonic", lambda: now)

        def passes(text):
            record = logging.LogRecord("x", logging.WARNING, "", 0, "%s", (text,), None)
            return record.getMessage() if sparing.filter(record) else None

        assert [passes("a"), passes("a"), passes("b"), passes("a")] == [
            "a",
            None,
            "b",
            None,
        ]
        now = 61.0
        assert [passes("b"), passes("a"), passes("a")] == [
            "b",
            "a (2 more before)",
            None,
        ]
