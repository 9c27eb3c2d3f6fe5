"""Sizes of samples for the extension's kernels.

Samples have true widths and formats, but fewer rows, heads or columns than the model where more would only repeat the
same work: a matrix keeps one whole block of the kernel's loop and the remainder of its true size.
"""

import mlx.core as mx

FEW = 7
"""Tokens of a sample with few tokens: passes over the codes with 4, 2 and 1 vectors."""
MANY = 115
"""Tokens of a sample with many tokens: tiles of 64 and of 48, then 3 tokens, which count as few."""
ACROSS_TILES = 67
"""Tokens of a sample that end in a second tile."""
BLOCK_GROUPS = 16
"""Groups of a row in one step of a kernel's inner loop; see ``formats.hpp``."""
ROWS = 48
"""Rows of a sample's matrix besides the remainder: whole blocks of 8 and of 24 rows."""


def reduced(size: int, block: int) -> int:
    """Return the smallest size with one whole ``block`` and the remainder of ``size``."""
    return size if size <= block else block + size % block


def tile_ends(tokens: int) -> mx.array:
    """Return the tokens at the ends of tiles, whose results are compared."""
    return mx.array(sorted({0, min(63, tokens - 1), min(64, tokens - 1), max(0, tokens - 4), tokens - 1}))
