"""The model behind the server: loaded, and made ready to decode for many."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors

from ..load import embedded_pair_path, load
from ..pair import Pair, pair_of
from ..row import Request
from ..target import text_model
from ..tokens import make_batch_decoder, make_request
from .arguments import Settings
from .kept import KeptCaches
from .order import Order
from .worker import Means

logger = logging.getLogger("mlx_gemma_mtp.server")

_KV_SHARE = 0.5  # of the memory that weights leave
_MIN_KV_BYTES = 2**28


@dataclass(frozen=True)
class Engine:
    """A model that is ready.

    Attributes:
        settings: The command's.
        means: What the worker decodes with.
        tokenizer: mlx-lm's.
        sampling: ``temp``, ``top_p``, ``top_k``, ``min_p`` of requests that do not say.
        model_len: Most tokens of prompt and answer together.
        vocab_size: Number of token ids.
        max_kv_bytes: The budget of running requests' caches.
        drafter_name: Where the drafter came from, a sentence.
        wired: Keeps the weights in memory while something is decoded.
    """

    settings: Settings
    means: Means
    tokenizer: Any
    sampling: dict[str, Any]
    model_len: int
    vocab_size: int
    max_kv_bytes: int
    drafter_name: str
    wired: Callable[[], AbstractContextManager[None]]
