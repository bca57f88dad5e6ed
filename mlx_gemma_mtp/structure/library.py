"""llguidance, which an extra installs: imported at the first use."""

from __future__ import annotations

from typing import Any

from ..errors import RequestError


def llguidance() -> Any:
    """The library that compiles grammars and makes masks of tokens.

    Raises:
        RequestError: It is not installed.
    """
    try:
        import llguidance as library
    except ImportError as error:
        raise RequestError(
            "llguidance must be installed for text with a given form: got no such "
            "package. Install mlx_gemma_mtp[structure]."
        ) from error
    return library


def limits() -> Any:
    """What a grammar may cost: they come from clients.

    With Gemma's 262144 tokens, on 2 cores of an AMD EPYC with other work, a mask of a
    common form took about 1 ms, and of the worst that were tried up to 130 ms, 40 ms in
    the mean, before they were refused. A state of the lexer takes 1 to 2 kB.
    """
    return llguidance().LLParserLimits(
        max_items_in_row=20_000,
        initial_lexer_fuel=400_000,
        step_lexer_fuel=20_000,
        step_max_items=20_000,
        max_lexer_states=10_000,
        max_grammar_size=500_000,
        verbose_errors=False,  # they would show a client's schema in logs
    )
