"""What the README and docs/ say of files, links, lengths and flags is true.

Run: python -m pytest tests/docs/test_pages.py
"""

from __future__ import annotations

import re
import sys
from pathlib import PurePosixPath

import pytest

from mlx_gemma_mtp.cli import generate
from scripts.docs_tables import with_tables
from tests.docs.pages import PAGES, ROOT, blocks, lines
from tests.test_layout import BELOW
from tests.tiny import uncompiled

MAX_README_LINES = 250
MAX_WALK = 15


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)


def anchors(page):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}


def targets(page):
    """What a page links to or shows: markdown's links, and HTML's pictures."""
    text = prose(page)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)
    yield from re.findall(r'src(?:set)?="([^"]+)"', text)


def resolved(page, target):
    """The place in the repository that a link means, and its anchor."""
    path, _, anchor = target.partition("#")
    place = (ROOT / page).parent / path if path else ROOT / page
    return place.resolve(), anchor


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in targets(page):
        if target.startswith(("http://", "https://")):
            continue
        place, anchor = resolved(page, target)
        assert place.exists(), target
        if anchor:
            linked = place.relative_to(ROOT).as_posix()
            assert anchor in anchors(linked), target


def test_every_page_is_linked_from_the_readme():
    linked = {resolved("README.md", target)[0] for target in targets("README.md")}
    assert {ROOT / page for page in PAGES} - linked == {ROOT / "README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_code(page):
    """Where it fails: make docs."""
    assert with_tables(PAGES[page]) == PAGES[page]


def test_flags_stand_in_one_table_each():
    marked = re.findall(r"<!-- table: ([\w-]+) -->", "".join(PAGES.values()))
    assert len(marked) == len(set(marked))


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    """A path with a folder, from the root or inside the package."""
    named = re.findall(r"`(?:python )?([\w./-]+/[\w-]+\.(?:py|html|md))", PAGES[page])
    for path in named:
        assert any((ROOT / top / path).exists() for top in ("", "mlx_gemma_mtp")), path


@pytest.mark.parametrize("page", PAGES)
def test_make_commands_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z][a-z-]+)", PAGES[page], re.M)) <= known


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= MAX_README_LINES


def test_the_readme_names_every_folder():
    rows = re.findall(r"^\| (`.*?) \|", PAGES["README.md"], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)/`", row)}
    package = ROOT / "mlx_gemma_mtp"
    folders = {path.parent.name for path in package.glob("*/*.py")}
    assert named == folders | {"embedded"}


def test_the_picture_of_the_folders_is_that_of_the_layout():
    """In it each folder stands above those that it imports."""
    picture = blocks("text", "docs/how-it-works.md")[0].splitlines()
    heights = {
        name: -number
        for number, line in enumerate(picture)
        for name in re.findall(r"\b(\w+)/", line)
    }
    assert set(heights) == set(BELOW)
    for folder, below in BELOW.items():
        for other in below - {"markup"}:
            assert heights[folder] > heights[other], (folder, other)


def test_requests_of_the_readme_are_those_of_the_servers_page():
    """tests/server/test_live.py makes those."""
    assert set(lines("sh", "README.md")) <= set(lines("sh", "docs/server.md"))
    assert not blocks("py", "README.md")


def test_the_walk_of_a_token_is_short_and_as_it_is(capsys):
    """A text is generated; each function of the walk is called."""
    page = PAGES["docs/how-it-works.md"]
    walk = page.partition("## One token through the folders")[2].partition("\n## ")[0]
    step = r"^\| \d+ \| \[`([\w/]+\.py)`\]\(\S+\) `([\w.]+)` \|"
    steps = re.findall(step, walk, re.MULTILINE)
    assert len(re.findall(r"^\| \d", walk, re.MULTILINE)) == len(steps)
    assert 5 < len({path for path, _ in steps}) <= MAX_WALK
    called = set()

    def note(frame, event, _):
        if event == "call":
            called.add((frame.f_code.co_filename, frame.f_code.co_qualname))

    with uncompiled():
        sys.setprofile(note)
        try:
            settings = "-p import -m 4 --exactness fast --num-draft-tokens 2"
            assert generate.main(settings.split()) == 0
        finally:
            sys.setprofile(None)
    package = ROOT / "mlx_gemma_mtp"
    assert {(str(package / path), name) for path, name in steps} <= called
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_pages_begin_with_one_title(page):
    titles = re.findall(r"^# .*$", prose(page), re.MULTILINE)
    assert len(titles) == 1
    assert PAGES[page].startswith(titles[0])
    assert PurePosixPath(page).name in PAGES["README.md"]
