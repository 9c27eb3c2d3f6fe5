"""Arrays that hold the caches of several sequences, so that one kernel serves all of them."""

from collections.abc import Sequence

import mlx.core as mx

from flashmoe_mlx.layers.cache import SequenceCache, own_contents
from flashmoe_mlx.layers.shared_row import Pair, SharedRow


def share_arrays(caches: Sequence[SequenceCache], rows: int, capacity: int) -> list[int]:
    """Move the contents of ``caches`` to rows of new arrays; return, for each row in turn, the index of its cache.

    Contents that share arrays already are moved by one operation for each array. Layers are moved one after the other,
    so that only one of them is in memory twice. After an error, all of ``caches`` are broken.

    Args:
        caches: caches with at least one token, whose contents no kernel is writing to.
        rows: the number of rows of the new arrays; the last rows may belong to no sequence.
        capacity: the number of tokens that a row has room for, at least the number of each cache.
    """
    before = next((cache.shared for cache in caches if cache.shared is not None), None)
    moving = [at for at, cache in enumerate(caches) if before is not None and before.is_beside(cache.shared)]
    joining = [at for at in range(len(caches)) if at not in set(moving)]
    own_contents([caches[at] for at in joining])
    taken = mx.array([shared.row for at in moving if (shared := caches[at].shared) is not None], mx.uint32)
    tokens: dict[int, Pair] = {}
    states: dict[int, Pair] = {}
    try:
        for layer, keeps_tokens in enumerate(caches[0].layers_that_keep_tokens):
            parts: list[list[mx.array]] = [caches[at].give_arrays(layer) for at in joining]
            if not keeps_tokens:
                parts = [[conv_state[None], state] for conv_state, state in parts]
            if before is not None:
                held = before.tokens.pop(layer) if keeps_tokens else before.states[layer]
                parts.insert(0, [mx.take(array, taken, axis=0) for array in held])
            room = capacity if keeps_tokens else None
            first, second = (_joined(list(arrays), rows, room) for arrays in zip(*parts, strict=True))
            mx.eval(first, second)
            (tokens if keeps_tokens else states)[layer] = first, second
    except BaseException:
        for cache in caches:
            cache.broken = True
        raise
    order = [*moving, *joining]
    for row, at in enumerate(order):
        caches[at].shared = SharedRow(tokens, row, states, row)
    return order


def _joined(parts: list[mx.array], rows: int, capacity: int | None) -> mx.array:
    """Return one array of ``rows`` rows, first those of ``parts``; with ``capacity`` for tokens, which are axis 2."""
    if capacity is not None:
        parts = [_with_capacity(part, capacity) for part in parts]
    missing = rows - sum(map(len, parts))
    if missing:
        parts = [*parts, mx.zeros((missing, *parts[0].shape[1:]), parts[0].dtype)]
    return mx.contiguous(mx.concatenate(parts))


def _with_capacity(part: mx.array, capacity: int) -> mx.array:
    """Return keys or values [rows, kv heads, capacity, width] with another capacity."""
    rows, heads, kept, width = part.shape
    if kept >= capacity:
        return part[:, :, :capacity]
    return mx.concatenate([part, mx.zeros((rows, heads, capacity - kept, width), part.dtype)], axis=2)
