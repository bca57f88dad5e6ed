"""How far the text of real edits repeats the file that was edited.

    python scripts/studies/real_edits.py path/to/repository path/to/tokenizer.json

Reads edits of Python files from a git history. The old file stands in front of the new
one, as in a request for an edit. For every place of the new file it notes what the host
knows there: how many of the newest tokens stood before, and how many of the next 8 are
those that followed. No text is kept: ``tests/drafting/edits.json`` has these numbers,
and the simulator drafts on them.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))

from mlx_gemma_mtp.constants import MAX_DRAFT_TOKENS
from mlx_gemma_mtp.engine.known_text import KnownText, num_equal

Places = list[tuple[int, int]]

_CHARACTERS = range(1500, 9000)  # of a file
_CHANGED = (0.01, 0.35)  # share of its lines


def main() -> None:
    """Read a history, write the numbers, print what they say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("repository", help="its git directory, with its history")
    parser.add_argument("tokenizer", help="a tokenizer.json, such as Gemma's")
    parser.add_argument("--count", type=int, default=16, help="how many edits")
    parser.add_argument("--output", default="tests/drafting/edits.json")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(args.tokenizer)
    edits = itertools.islice(read_edits(args.repository, tokenizer), args.count)
    texts = [places(old, new) for old, new in edits]
    if len(texts) < args.count:
        parser.error(f"{args.repository} has {len(texts)} edits: need {args.count}")
    runs = [run_lengths(text) for text in texts]
    Path(args.output).write_text(json.dumps(runs, separators=(",", ":")) + "\n")
    every = [place for text in texts for place in text]
    long = [same for match, same in every if match >= 9]
    sys.stdout.write(
        f"{len(texts)} edits, {len(every)} tokens. Of the next {MAX_DRAFT_TOKENS}, "
        f"{fmean(same for _, same in every):.2f} are those that followed before; "
        f"{fmean(long):.2f} behind 9 or more that are the same, "
        f"{100 * len(long) / len(every):.0f} % of all places.\n"
    )


def read_edits(
    repository: str, tokenizer: Tokenizer
) -> Iterator[tuple[list[int], list[int]]]:
    """Old and new tokens of edits, at most one of a commit, in an order by chance."""
    commits = _git(repository, "log", "--no-merges", "--format=%H").split()
    random.Random(1).shuffle(commits)
    for commit in commits:
        tree = ("diff-tree", "-r", "--no-commit-id", "--diff-filter=M", commit)
        for line in _git(repository, *tree).splitlines():
            about, path = line.split("\t")[:2]
            if not path.endswith(".py"):
                continue
            blobs = about.split()[2:4]
            old, new = (_git(repository, "cat-file", "blob", blob) for blob in blobs)
            if len(old) in _CHARACTERS and _is_edit(old, new):
                yield tokenizer.encode(old).ids, tokenizer.encode(new).ids
                break


def places(old: list[int], new: list[int]) -> Places:
    """Length of the match, and tokens that follow, at each place of a new text."""
    text, found = KnownText(old), []
    for i, token in enumerate(new):
        same = num_equal(text.following, new[i : i + MAX_DRAFT_TOKENS])
        found.append((text.length, same))
        text.extend([token])
    return found


def run_lengths(text: Places) -> list[tuple[int, int, int]]:
    """Places that are alike behind each other: match, tokens that follow, how many."""
    return [(*place, len(list(alike))) for place, alike in itertools.groupby(text)]


def _is_edit(old: str, new: str) -> bool:
    """Whether as much has changed as in an edit."""
    lines, others = old.splitlines(), new.splitlines()
    matcher = difflib.SequenceMatcher(None, lines, others, autojunk=False)
    changed = sum(
        max(old_end - old_start, new_end - new_start)
        for tag, old_start, old_end, new_start, new_end in matcher.get_opcodes()
        if tag != "equal"
    )
    least, most = _CHANGED
    return least < changed / max(len(others), 1) < most


def _git(repository: str, *command: str) -> str:
    """What git says, nothing where it fails."""
    run = subprocess.run(
        ["git", "--git-dir", repository, *command],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    return run.stdout


if __name__ == "__main__":
    main()
