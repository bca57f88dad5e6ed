"""The converter: Hugging Face weights in, quantized MLX arrays out, pair by pair.

The code stands in ``convert/`` in a checkout (``python -m convert``) and is installed
as ``mlx_gemma_mtp.convert``: its own modules are imported relatively, ``mlx_gemma_mtp``
absolutely, so both are one code. Importing it imports nothing else.
"""
