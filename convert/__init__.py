"""The place of the checkpoint converter, which is not written yet.

It will read a Hugging Face checkpoint of a target or a drafter and write it in the
layout this package loads, cast and quantized. The code stands in ``convert/`` in a
checkout (``python -m convert``) and is installed as ``mlx_gemma_mtp.convert``: its own
modules are imported relatively, ``mlx_gemma_mtp`` absolutely, so both are one code.
"""
