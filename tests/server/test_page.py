"""The server's page in a real browser: one prompt run twice, live figures, errors.

The browser is the one that CHROME names. A picture of the page goes to build/page.png.

Run: make test-clients
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mlx_gemma_mtp.server.app import PAGE
from tests.server.served import CHAT_TEMPLATE, ROOT, served

pytestmark = pytest.mark.clients

KEY = "sesame"
CODE = "import os\n\n\nclass Stack:\n"
PICTURE = ROOT / "build" / "page.png"
RUN_MS = 120_000.0
VERDICT = ".verdict.same, .verdict.differ"
SPEED = re.compile(r"[0-9]+\.[0-9] tokens/s")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # By name: only `make test-clients` installs it, but every run reads this file.
    playwright = import_module("playwright.sync_api")
    # Chromium's sandbox refuses root, whom tests of a container run as.
    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=os.environ["CHROME"], args=args
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    # Drafts of a number that no clock chooses: there is always something to show.
    settings = ("--num-draft-tokens", "4")
    with served(tmp_path_factory.mktemp("page"), *settings) as address:
        yield address


@pytest.fixture(scope="module")
def locked_address(tmp_path_factory):
    """Of a server with a key and a chat template."""
    folder = tmp_path_factory.mktemp("locked")
    template = folder / "template.jinja"
    template.write_text(CHAT_TEMPLATE)
    with served(folder, "--api-key", KEY, "--chat-template", str(template)) as address:
        yield address


class Visit:
    """A page, and what the browser says of it.

    Attributes:
        page: Playwright's page.
        complaints: Errors and warnings of the console and of scripts.
        elsewhere: Addresses of other places that were asked for something.
    """

    def __init__(self, browser: Any, address: str, **settings: Any) -> None:
        self._context = browser.new_context(**settings)
        self.page: Any = self._context.new_page()
        self.page.set_default_timeout(30_000)
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url, address))
        self.page.goto(address)

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _note(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:")):
            self.elsewhere.append(url)

    def connect(self) -> None:
        self.page.wait_for_selector("#status[data-state=on]")

    def run(self, prompt: str, max_tokens: int = 48) -> None:
        self.page.fill("#prompt", prompt)
        self.page.fill("#max-tokens", str(max_tokens))
        self.page.click("#run")

    def until(self, expression: str) -> None:
        """Wait until an expression is true.

        Playwright's own way compiles a string in the page, which its policy forbids.
        """
        for _ in range(600):
            if self.page.evaluate(expression):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"still not true after 30 s: {expression}")

    def texts(self) -> list[str]:
        return [self.page.text_content(f"#{id} .text") for id in ("plain", "drafted")]

    def close(self) -> None:
        self._context.close()


@pytest.fixture
def visit(browser):
    """Opens pages; at the end none of them has complained or asked anybody else."""
    visits = []

    def open_page(address: str, **settings: Any) -> Visit:
        visits.append(Visit(browser, address, **settings))
        return visits[-1]

    yield open_page
    for each in visits:
        each.close()
        assert each.complaints == []
        assert each.elsewhere == []


def stream_of(text: str) -> str:
    """An answer as the server would stream it."""
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    events = [
        {"choices": [{"index": 0, "text": text, "finish_reason": None}]},
        {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]},
        {"choices": [], "usage": usage},
    ]
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return "".join([*lines, "data: [DONE]\n\n"])


def answer_with(page: Any, *texts: str) -> None:
    """Let runs get these texts, in turn."""
    rest = iter(texts)
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            body=stream_of(next(rest)), content_type="text/event-stream"
        ),
    )


def test_one_prompt_with_drafts_and_without(visit, address):
    """The greedy texts are the same, and figures of both appear."""
    opened = visit(address, viewport={"width": 1100, "height": 900})
    opened.connect()
    page = opened.page
    assert page.input_value("#prompt") == "def fibonacci(n):\n"
    for _ in range(2):  # the first run compiles
        opened.run(CODE, max_tokens=96)
        assert page.is_disabled("#run")
        page.wait_for_selector(VERDICT, timeout=RUN_MS)
        plain, drafted = opened.texts()
        assert plain == drafted != ""
        assert re.fullmatch(
            r"✓ The texts are the same\. With drafts [0-9]+\.[0-9]{2} times as fast\.",
            page.inner_text("#verdict"),
        )
        for card in ("plain", "drafted"):
            assert SPEED.fullmatch(page.inner_text(f"#{card} .speed"))
            assert page.inner_text(f"#{card} .figures").startswith("96 tokens after ")
        assert "rounds without drafts" in page.inner_text("#plain .figures")
        assert page.is_enabled("#run")
        assert page.is_hidden("#error")
    opened.until("stats.tokens_per_second > 0 && stats.live === 0")
    PICTURE.parent.mkdir(exist_ok=True)
    page.screenshot(path=PICTURE, full_page=True)
    assert PICTURE.stat().st_size > 20_000


def test_live_figures(visit, address):
    opened = visit(address)
    opened.connect()
    page = opened.page
    opened.run(CODE)
    page.wait_for_selector(VERDICT, timeout=RUN_MS)
    opened.run(CODE, max_tokens=900)
    opened.until("document.getElementById('load').textContent[0] === '1'")
    opened.until("Number(document.getElementById('speed').textContent) > 0")
    page.click("#stop")
    opened.until(
        "document.getElementById('acceptance').textContent.includes('of all drafts')"
    )
    assert page.locator("#positions .bar").count() == 8
    assert page.locator("#lengths .bar").count() == 9
    shares = page.locator("#lengths .label").all_text_contents()
    assert any(shares)
    assert re.search(r"rounds; newest: K = [0-8]$", page.inner_text("#chosen"))
    assert page.get_attribute("#positions", "aria-label").startswith("Drafts accepted")
    assert page.get_attribute("#spark .curve", "d").count(",") > 1
    assert page.inner_text("#model") == "embedded with drafter"


def test_sampled_texts_of_a_seed_are_the_same(visit, address):
    opened = visit(address)
    opened.connect()
    texts = []
    for seed in ("1", "2"):
        opened.page.fill("#temperature", "1")
        opened.page.fill("#seed", seed)
        opened.run(CODE, max_tokens=24)
        opened.page.wait_for_selector(VERDICT, timeout=RUN_MS)
        assert opened.page.locator(".verdict.same").count() == 1
        texts.append(opened.texts()[0])
    assert texts[0] != texts[1]


def test_texts_that_differ_are_marked(visit, address):
    opened = visit(address)
    opened.connect()
    answer_with(opened.page, "the same, then one", "the same, then another")
    opened.run("x")
    opened.page.wait_for_selector(".verdict.differ")
    assert "differ from character 16 on" in opened.page.inner_text("#verdict")
    marked = opened.page.locator(".text mark").all_text_contents()
    assert marked == ["one", "another"]
    assert opened.texts() == ["the same, then one", "the same, then another"]


def test_text_is_never_html(visit, address):
    opened = visit(address)
    opened.connect()
    bad = "<img src=x onerror='throw 1'><script>throw 2</script></pre>&amp;"
    answer_with(opened.page, bad, f"{bad}<b>")
    opened.run("x")
    opened.page.wait_for_selector(".verdict.differ")
    assert opened.texts() == [bad, f"{bad}<b>"]
    assert opened.page.locator("img, .text script, b").count() == 0


def test_a_run_can_be_stopped(visit, address):
    opened = visit(address)
    opened.connect()
    opened.run(CODE, max_tokens=900)
    opened.until("document.querySelector('#plain .text').textContent.length > 5")
    opened.page.click("#stop")
    opened.until("document.getElementById('verdict').textContent === 'Stopped.'")
    assert opened.page.inner_text("#plain .state") == "not finished"
    assert opened.page.is_hidden("#error")
    # The server has let the row go.
    opened.until("stats.live === 0")


def test_the_servers_words_are_shown(visit, address):
    opened = visit(address)
    opened.connect()
    opened.run(CODE * 500)
    opened.page.wait_for_selector("#error:not([hidden])")
    assert "at most 1024 tokens" in opened.page.inner_text("#error")
    assert opened.page.inner_text("#verdict").startswith("No comparison")
    assert any("400" in text for text in opened.complaints)  # the browser's own line
    opened.complaints.clear()


def test_an_error_in_the_middle_is_shown(visit, address):
    opened = visit(address)
    opened.connect()
    failure = 'data: {"error": {"message": "the engine has failed"}}\n\n'
    opened.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            body=stream_of("one").split("data: [DONE]")[0] + failure,
            content_type="text/event-stream",
        ),
    )
    opened.run("x")
    opened.page.wait_for_selector("#error:not([hidden])")
    assert opened.page.inner_text("#error") == "the engine has failed"


def test_a_server_that_is_gone(visit, address):
    opened = visit(address)
    opened.connect()
    opened.page.route("**/*", lambda route: route.abort())
    opened.page.wait_for_selector("#status[data-state=off]")
    assert opened.page.inner_text("#status") == "no connection"
    opened.run("x")
    opened.page.wait_for_selector("#error:not([hidden])")
    assert "cannot be reached" in opened.page.inner_text("#error")
    opened.page.unroute("**/*")
    opened.connect()
    opened.complaints.clear()  # the browser's own lines


def test_key_and_chat_template(visit, locked_address):
    opened = visit(locked_address)
    page = opened.page
    page.wait_for_selector("#key-card:not([hidden])")
    assert page.inner_text("#status") == "needs an API key"
    page.fill("#key", KEY)
    page.click("#key-form button")
    opened.connect()
    assert page.inner_text("#prompt-label") == "Prompt"
    with page.expect_request("**/v1/chat/completions") as request:
        opened.run(CODE)
    assert request.value.post_data_json["messages"][0]["content"] == CODE
    page.wait_for_selector(VERDICT, timeout=RUN_MS)
    plain, drafted = opened.texts()
    assert plain == drafted != ""
    # It is kept nowhere.
    assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 0]
    assert page.evaluate("document.cookie") == ""
    opened.complaints[:] = [text for text in opened.complaints if "401" not in text]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(visit, address, scheme):
    opened = visit(
        address,
        viewport={"width": 360, "height": 740},
        has_touch=True,
        color_scheme=scheme,
    )
    opened.connect()
    page = opened.page
    answer_with(page, "word " * 200 + "x" * 500, "word " * 200 + "x" * 500)
    opened.run("x")
    page.wait_for_selector(".verdict.same")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width == 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    levels = [int(level) for level in re.findall(r"\d+", background)]
    assert (sum(levels) < 3 * 128) == (scheme == "dark")


def test_every_field_has_a_name_and_colors_contrast(visit, address):
    """As WCAG 2 counts contrast: 4.5 for text."""
    opened = visit(address)
    opened.connect()
    page = opened.page
    for field in page.locator("input, textarea").all():
        assert field.evaluate("field => field.labels.length") == 1
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colors = page.evaluate(
            """() => {
              const style = getComputedStyle(document.documentElement);
              const names = ["page", "card", "faint", "text", "soft", "accent",
                "good", "good-soft", "bad", "bad-soft", "mark"];
              return Object.fromEntries(
                names.map((name) => [name, style.getPropertyValue(`--${name}`)]));
            }"""
        )
        pairs = [
            ("text", "card"),
            ("text", "page"),
            ("text", "faint"),
            ("text", "mark"),
            ("soft", "card"),
            ("soft", "page"),
            ("card", "accent"),
            ("good", "good-soft"),
            ("bad", "bad-soft"),
        ]
        for front, back in pairs:
            assert contrast(colors[front], colors[back]) >= 4.5, (scheme, front, back)


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2 defines it."""
    levels = [int(color.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4
        for level in levels
    ]
    return sum(
        share * level
        for share, level in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
    )


def test_the_page_is_one_file():
    text = Path(PAGE).read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href|action)=(?!"data:)', text)
    assert "innerHTML" not in text
    assert len(text) < 40_000
