"""The ``mlx_gemma_mtp.selftest`` command: what holds on this machine, and how fast.

Every section looks at one thing, gives one ``result.Result`` and knows nothing of the
others; ``sections`` runs them, ``page`` shows what they found.
"""
