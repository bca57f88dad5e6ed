"""Fused kernels of a decision, one per file; the plain operations are their reference.

They are used where Metal (or CUDA) is the device; everywhere else the operations of
``distribution``, ``acceptance`` and ``decision`` run.
"""
