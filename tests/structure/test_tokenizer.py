"""llguidance's tokenizer: every token as text has it, built once, by any thread.

Run: python -m pytest tests/structure/test_tokenizer.py
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from copy import copy
from threading import Barrier

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, models

from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.structure import tokenizer as tokenizer_module
from mlx_gemma_mtp.structure.tokenizer import control_tokens, grammar_tokenizer
from tests.gemma import EOS_IDS, SPECIAL, VOCAB_SIZE
from tests.tiny import EOS, tiny_tokenizer


def wrapped():
    return TokenizerWrapper(tiny_tokenizer(), eos_token_ids=[EOS])


def test_tokens_are_gemmas_own(whole_gemma_tokenizer):
    tokenizer = whole_gemma_tokenizer("july-e2b")
    made = grammar_tokenizer(tokenizer)
    assert made.vocab_size == VOCAB_SIZE
    assert set(made.eos_tokens) == set(EOS_IDS)
    for text in ('{"größe": [1, "日本 €"]}', "  two  spaces\n\n\ttab", "\u0416"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert made.tokenize_str(text) == ids
        assert made.decode_bytes(ids) == text.encode()
    assert made.is_special_token(tokenizer.convert_tokens_to_ids("<|channel>"))
    assert not made.is_special_token(tokenizer.convert_tokens_to_ids("<unused9>"))


def test_text_that_spells_a_control_token_is_of_ordinary_ones(whole_gemma_tokenizer):
    """As the library tokenizers has it where it is told to take none for a token."""
    tokenizer = whole_gemma_tokenizer("july-e2b")
    made = grammar_tokenizer(tokenizer)
    plain = copy(tokenizer.backend_tokenizer)
    plain.encode_special_tokens = True
    assert control_tokens(tokenizer) == {name: i for i, name in SPECIAL.items()}
    for name, token in control_tokens(tokenizer).items():
        for text in (name, f"a{name}b", name * 2):
            ids = made.tokenize_str(text)
            assert ids == plain.encode(text, add_special_tokens=False).ids
            assert not SPECIAL.keys() & set(ids)
            assert made.decode_bytes(ids) == text.encode()
        assert made.is_special_token(token)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_only_control_tokens_have_other_names(kind):
    pieces = ["<unk>", "a", "b", "<", ">", "<e>", "<ab>"]
    model = (
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>")
        if kind == "bpe"
        else models.Unigram([(piece, -1.0) for piece in pieces], 0)
    )
    given = Tokenizer(model)
    given.add_special_tokens(["<unk>", "<e>", "<b>"])
    given.add_tokens([AddedToken("<ab>")])
    found = Tokenizer.from_str(tokenizer_module._renamed(given.to_str()))
    decoder = given.get_added_tokens_decoder()
    renamed = found.get_added_tokens_decoder()
    assert renamed.keys() == decoder.keys()
    kept = {
        token for token in decoder if renamed[token].content == decoder[token].content
    }
    assert kept == {pieces.index("<ab>")}
    assert found.get_vocab_size() == given.get_vocab_size()
    assert found.encode("b<ab>").tokens == ["b", "<ab>"]
    assert "".join(found.encode("<b>a").tokens) == "<b>a"
    assert len(found.encode("<b>a").tokens) == 4
    assert given.encode("<b>a").tokens == ["<b>", "a"]


def test_is_built_once_for_a_tokenizer(monkeypatch):
    built = []
    build = tokenizer_module._build

    def counted(*args):
        built.append(args)
        return build(*args)

    monkeypatch.setattr(tokenizer_module, "_build", counted)
    one, other = tiny_tokenizer(), wrapped()
    wrappers = [TokenizerWrapper(one, eos_token_ids=[EOS]) for _ in range(4)]
    together = Barrier(8)

    def make(i):
        together.wait()
        return grammar_tokenizer(wrappers[i % 4])

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make, range(8)))
    assert len(set(map(id, made))) == 1
    assert grammar_tokenizer(other) is not made[0]
    assert len(built) == 2


def test_is_let_go_with_the_tokenizer():
    import gc

    tokenizer = wrapped()
    grammar_tokenizer(tokenizer)
    before = len(tokenizer_module._entries)
    del tokenizer
    gc.collect()
    assert len(tokenizer_module._entries) < before


def test_a_mistake_is_none_for_the_next_call():
    tokenizer = wrapped()
    tokenizer.eos_token_ids = set()
    with pytest.raises(RequestError, match="must have a token that ends it"):
        grammar_tokenizer(tokenizer)
    tokenizer.eos_token_ids = {EOS}
    assert grammar_tokenizer(tokenizer).eos_tokens == [EOS]


def test_the_tokenizer_stays_as_it_is():
    tokenizer = wrapped()
    tokenizer.backend_tokenizer.enable_truncation(4)
    grammar_tokenizer(tokenizer)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 4


def test_other_kinds_are_refused():
    with pytest.raises(RequestError, match=r"Use a checkpoint with tokenizer\.json"):
        grammar_tokenizer(object())


def test_what_llguidance_cannot_read_is_said(monkeypatch):
    import llguidance

    def failing(*args, **settings):
        raise ValueError("no decoder")

    monkeypatch.setattr(llguidance, "LLTokenizer", failing)
    with pytest.raises(RequestError, match="that llguidance can read: got no decoder"):
        grammar_tokenizer(wrapped())
