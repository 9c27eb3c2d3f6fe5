"""The memory that a prompt cache may take."""

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.stores.memory import GIB, total_memory

_LARGEST_DEFAULT = 4 * GIB
_SHARE = 16
"""The default is the machine's memory divided by this."""


def prompt_cache_bytes(gib: float | None, memory: int | None = None) -> int:
    """Return the bytes of a prompt cache of ``gib`` GiB; None stands for the default.

    Args:
        gib: the size in GiB.
        memory: the memory of the machine in bytes; None for that of this machine.

    Raises:
        InputError: ``gib`` is negative or not a number; code "out_of_range".
    """
    if gib is None:
        return min(_LARGEST_DEFAULT, (total_memory() if memory is None else memory) // _SHARE)
    if isinstance(gib, bool) or not isinstance(gib, int | float) or not 0 <= gib < 2**20:
        raise InputError(f"prompt_cache_gib={gib!r}: must be a number of GiB, or 0 for no cache", code="out_of_range")
    return int(gib * GIB)
