"""The ``mlx_gemma_mtp.chat`` command: a conversation in the terminal.

Read ``__main__`` → ``session`` → ``kept`` for the flow.
"""
