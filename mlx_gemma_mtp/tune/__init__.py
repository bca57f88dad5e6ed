"""Training a drafter for the target that it will run with: `mlx_gemma_mtp.tune`.

Documents become texts (the target's own continuations), texts become records (what the
target hands a drafter, once for every text, on disk), and records train the drafter.
"""
