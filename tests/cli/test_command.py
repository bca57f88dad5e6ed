"""What all commands share: how they end, what they write, and what is text.

Run: python -m pytest tests/cli/test_command.py
"""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from mlx_gemma_mtp.cli.command import (
    Parser,
    check_output_file,
    exit_status,
    not_utf8,
    write_file,
)
from mlx_gemma_mtp.errors import OutputError

SIGNALS = [signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(params=[signal.SIG_DFL, signal.SIG_IGN])
def handler(request):
    """As a shell starts a command, and as nohup does."""
    before = {number: signal.signal(number, request.param) for number in SIGNALS}
    yield request.param
    for number in SIGNALS:
        assert signal.signal(number, before[number]) == request.param


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_stops_what_does_not_ignore_it(handler, number):
    def run() -> int:
        os.kill(os.getpid(), number)
        return 0

    notes = io.StringIO()
    status = exit_status(run, io.StringIO(), notes, stopped="stopped")
    is_ignored = handler == signal.SIG_IGN
    assert status == (0 if is_ignored else 128 + number)
    assert notes.getvalue() == ("" if is_ignored else "stopped\n")


@pytest.mark.parametrize("stopped", [None, "stopped"])
def test_control_c(stopped):
    def run() -> int:
        raise KeyboardInterrupt

    notes = io.StringIO()
    assert exit_status(run, io.StringIO(), notes, stopped=stopped) == 130
    assert notes.getvalue() == ("stopped\n" if stopped else "")


def ended(run, output):
    """A command's exit status and what it said."""
    notes = io.StringIO()
    return exit_status(run, output, notes), notes.getvalue()


class TestWriting:
    @pytest.mark.parametrize("is_buffered", [True, False])
    def test_a_full_disk(self, tmp_path, is_buffered):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with (tmp_path / "x").open("w", encoding="utf-8") as output:
            output.reconfigure(write_through=not is_buffered)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
            try:
                status, said = ended(lambda: output.write("x" * 20) and 0, output)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert status == 1
        assert said.startswith("error: what is written must find room: got File too")
        assert said.count("\n") == 1

    @pytest.mark.parametrize("names", [("/there",), ("/here", None, "/there")])
    def test_a_full_disk_beside_standard_output(self, names):
        def run():
            raise OSError(errno.ENOSPC, "No space left on device", *names)

        status, said = ended(run, io.StringIO())
        assert (status, said.count("\n")) == (1, 1)
        assert "room at /there: got No space left on device" in said

    def test_what_is_no_mistake_of_the_users_is_raised(self):
        def run():
            raise FileNotFoundError(errno.ENOENT, "gone")

        with pytest.raises(FileNotFoundError):
            exit_status(run, io.StringIO(), io.StringIO())

    def test_standard_output_that_is_closed(self):
        status, said = ended(lambda: 0, None)
        assert (status, said) == (
            1,
            "error: standard output must be open: got a closed one.\n",
        )

    def test_help_that_cannot_be_written(self, monkeypatch):
        """At once, as where PYTHONUNBUFFERED is set."""

        class Full(io.StringIO):
            def write(self, text):
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(sys, "stdout", Full())
        parser = Parser(prog="x")
        status, said = ended(lambda: parser.parse_args(["--help"]), sys.stdout)
        assert (status, said.count("\n")) == (1, 1)

    def test_notes_that_cannot_be_written(self):
        class Full(io.StringIO):
            def write(self, text):
                raise OSError(errno.ENOSPC, "No space left on device")

        def run():
            raise OutputError("no")

        assert exit_status(run, io.StringIO(), Full()) == 1

    def test_standard_input_that_is_closed_has_ended(self, monkeypatch):
        monkeypatch.setattr(sys, "stdin", None)

        def run():
            with sys.stdin as source:
                return len(source.read())

        assert ended(run, io.StringIO()) == (0, "")


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("none/x", "No such file or directory"),
            ("folder", "Is a directory"),
            ("file/x", "Not a directory"),
            ("file/x/y", "Not a directory"),
            ("x" * 300, "File name too long"),
        ],
    )
    def test_is_refused_before_and_after(self, tmp_path, name, reason):
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").touch()
        path = str(tmp_path / name)
        for write in (check_output_file, partial(write_file, text="x")):
            with pytest.raises(OutputError, match=f"--x must be .*: {reason}"):
                write("--x", path)

    def test_no_permission(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        for name in ("new", "old"):
            (tmp_path / "old").touch()
            with pytest.raises(OutputError, match="Permission denied"):
                check_output_file("--x", str(tmp_path / name))

    def test_the_longest_name_there_can_be(self, tmp_path):
        path = tmp_path / ("\N{BLACK SQUARE}" * 84)
        check_output_file("--x", str(path))
        write_file("--x", str(path), "y")
        assert path.read_text() == "y"

    def test_a_full_disk_leaves_what_was_there(self, tmp_path):
        path = tmp_path / "x"
        path.write_text("before")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(OutputError, match="File too large"):
                write_file("--x", str(path), "y" * 2000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_text() == "before"
        assert list(tmp_path.iterdir()) == [path]

    def test_mode_and_links_stay(self, tmp_path):
        path, link = tmp_path / "x", tmp_path / "link"
        path.touch(mode=0o600)
        link.symlink_to(path)
        for place in (path, link):
            write_file("--x", str(place), str(place))
            assert path.read_text() == str(place)
            assert path.stat().st_mode & 0o777 == 0o600
        assert link.is_symlink()


class TestEncoding:
    @pytest.mark.parametrize("name", ["utf-8", "UTF8", "ascii", "latin-1"])
    def test_what_is_not_utf8_is_told(self, name):
        raw = io.BytesIO()
        output = io.TextIOWrapper(raw, encoding=name)
        status, said = ended(lambda: output.write("\udcff") and 0, output)
        assert (status, raw.getvalue()) == (0, b"?")
        assert said.startswith(f"The terminal's encoding is {name}, not UTF-8") == (
            not name.lower().startswith("utf")
        )

    def test_a_locale_for_real(self):
        """The text is UTF-8; that the locale is not is what has to be said."""
        code = "from mlx_gemma_mtp.cli.generate import main; raise SystemExit(main())"
        found = subprocess.run(
            [sys.executable, "-c", code, "--verbose", "f", "-p", "é"],
            capture_output=True,
            check=False,
            env=os.environ
            | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"},
            cwd=Path(__file__).parents[2],
        )
        note, error = found.stderr.decode().splitlines()
        assert (found.returncode, found.stdout) == (1, b"")
        assert note.startswith("The terminal's encoding is ascii, not UTF-8")
        assert error.startswith("error: the terminal's encoding must be UTF-8 for the")

    def test_standard_input_in_a_locale(self):
        for name, expected in [("ascii", "got ascii"), ("utf-8", "must be UTF-8 text")]:
            with pytest.raises(UnicodeError) as caught:
                "\udcff".encode("utf-8", "surrogateescape").decode(name)
            assert expected in str(not_utf8("the prompt", caught.value))


def test_libraries_are_quiet():
    """What transformers says where it is imported without PyTorch, for one."""
    code = """
import io, os, sys
from mlx_gemma_mtp.cli.command import exit_status
for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
    os.environ.pop(name, None)
def run():
    import transformers, warnings
    transformers.logging.get_logger("transformers.x").warning("advice")
    transformers.logging.get_logger("transformers.x").warning_advice("advice")
    return 0
raise SystemExit(exit_status(run, sys.stdout, sys.stderr))
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
