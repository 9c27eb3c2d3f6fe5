"""The gated delta rule for many tokens, in parallel over the tokens of a chunk.

Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv 2412.06464), section 3.3;
without decays in Yang, Wang, Zhang, Shen, Kim, "Parallelizing Linear Transformers with the Delta Rule over Sequence
Length" (arXiv 2406.06484). In a chunk that begins with the state S, let p(t, i) be the product of the decays of
tokens i + 1 to t, and g(t) the product of all decays up to t. Token t adds u(t) k(t)^T to the state, where

    u(t) = beta(t) (v(t) - g(t) S k(t) - sum over i < t of p(t, i) (k(t) . k(i)) u(i)),

a triangular system: U = V' - W S^T with V' = T beta V, W = T beta g K, and T the inverse of the unit lower triangular
I + beta p (K K^T). The outputs, and the state S' after the chunk of C tokens, are

    Y = g Q S^T + p (Q K^T) U = (g Q - p (Q K^T) W) S^T + p (Q K^T) V'
    S' = g(C) S + U^T (p(C) K) = S (g(C) I - W^T (p(C) K)) + V'^T (p(C) K).
"""

from functools import cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from flashmoe_mlx.custom_kernels.precision import widen

CHUNK = 64
HOST_CHUNK = 32
_BLOCK = 16


def gated_delta(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    decay: mx.array,
    beta: mx.array,
    state: mx.array,
    chunk: int = CHUNK,
) -> tuple[mx.array, mx.array]:
    """Compute ``reference.gated_delta`` for all chunks at once, except for the states between them, S' = S M + B.

    This needs about 40 times the memory of ``values`` in f32.

    Args:
        queries: as for ``reference.gated_delta``.
        keys: as for ``reference.gated_delta``.
        values: as for ``reference.gated_delta``.
        decay: as for ``reference.gated_delta``.
        beta: as for ``reference.gated_delta``.
        state: as for ``reference.gated_delta``.
        chunk: tokens of a chunk, a power of two from 16.
    """
    length, key_heads, key_dim = queries.shape[1:]
    heads, value_dim = values.shape[2:]
    each = heads // key_heads
    chunks = -(-length // chunk)
    # The tokens that pad the last chunk leave the state unchanged: no decay, beta 0.
    missing = chunks * chunk - length
    q, k, v, beta = (_filled(widen(part)[0], missing, 0) for part in (queries, keys, values, beta))
    decay = _filled(widen(decay)[0], missing, 1)

    # [chunks, key heads, value heads per key head, tokens, ...]
    q, k = (part.reshape(chunks, chunk, key_heads, key_dim).swapaxes(1, 2) for part in (q, k))
    v = v.reshape(chunks, chunk, key_heads, each, value_dim).transpose(0, 2, 3, 1, 4)
    decay, beta = (
        part.reshape(chunks, chunk, key_heads, each).transpose(0, 2, 3, 1)[..., None] for part in (decay, beta)
    )
    begun = mx.cumprod(decay, axis=-2)
    # Products, not differences of sums of logarithms: exact to a few ulp for any decay, including 0.
    lower = mx.tril(mx.ones((chunk, chunk), mx.bool_))
    strictly = mx.tril(lower, -1)
    between = mx.where(lower, mx.cumprod(mx.where(strictly, decay, 1), axis=-2), 0)

    k_transposed = k.swapaxes(-1, -2)
    system = mx.where(strictly, beta * between * (k @ k_transposed)[:, :, None], 0)
    inverse = unit_lower_inverse(system) * beta.swapaxes(-1, -2)
    new = inverse @ v
    recalling = (inverse * begun.swapaxes(-1, -2)).reshape(chunks, key_heads, each * chunk, chunk) @ k
    recalling = recalling.reshape(chunks, key_heads, each, chunk, key_dim)
    seen = between * (q @ k_transposed)[:, :, None]

    fading = between[..., -1, :, None] * k[:, :, None]
    step = begun[..., -1:, :] * mx.eye(key_dim) - recalling.swapaxes(-1, -2) @ fading
    added = new.swapaxes(-1, -2) @ fading
    states = [widen(state)[0].reshape(key_heads, each, value_dim, key_dim)]
    for number in range(chunks):
        states.append(added[number] + states[-1] @ step[number])
    initial = mx.stack(states[:-1])
    y = (begun * q[:, :, None] - seen @ recalling) @ initial.swapaxes(-1, -2) + seen @ new
    y = y.transpose(0, 3, 1, 2, 4).reshape(1, chunks * chunk, heads, value_dim)
    return y[:, :length].astype(queries.dtype), states[-1].reshape(state.shape)


def unit_lower_inverse(below: mx.array) -> mx.array:
    """Return the inverse of I + ``below``, which is strictly lower triangular [..., n, n], n a power of two.

    The inverses A' and D' of the halves give the inverse of the whole: [[A, 0], [C, D]] has [[A', 0], [-D' C A', D']].
    All intermediate values are entries of inverses, which the delta rule keeps small. The product
    (I - B)(I + B^2)(I + B^4)... is unsuitable: powers of B = ``below`` grow like binomial coefficients where keys are
    similar.
    """
    size = below.shape[-1]
    if size <= _BLOCK:
        inverse = mx.eye(size)
        for number, mask in enumerate(_corners(size)):
            corners = mx.where(mx.array(mask), below, 0)
            inverse = inverse - (inverse @ corners @ inverse if number else corners)
        return inverse
    half = size // 2
    first, second = unit_lower_inverse(mx.stack([below[..., :half, :half], below[..., half:, half:]]))
    corner = -(second @ below[..., half:, :half] @ first)
    upper = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
    return mx.concatenate([upper, mx.concatenate([corner, second], axis=-1)], axis=-2)


def gated_delta_on_host(
    queries: mx.array, keys: mx.array, values: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Compute ``reference.gated_delta`` by numpy, chunk by chunk; evaluate the arguments.

    MLX's products of f32 on CPUs without Accelerate use no vector instructions; numpy comes with a BLAS. The BLAS uses
    one thread: products of this size gain little from more, and threads that wait for each other a hundred times per
    chunk take ten times as long as soon as another program needs a core.
    """
    length, key_heads, key_dim = queries.shape[1:]
    heads, value_dim = values.shape[2:]
    each = heads // key_heads
    q, k, v, decays, betas, memory = (_as_numpy(part)[0] for part in (queries, keys, values, decay, beta, state))
    v = v.reshape(length, key_heads, each, value_dim)
    decays, betas = (part.reshape(length, key_heads, each) for part in (decays, betas))
    memory = memory.reshape(key_heads, each * value_dim, key_dim).copy()
    y = np.empty(v.shape, np.float32)
    with _blas().limit(limits=1, user_api="blas"):
        for start in range(0, length, HOST_CHUNK):
            part = slice(start, start + HOST_CHUNK)
            _host_chunk(q[part], k[part], v[part], decays[part], betas[part], memory, y[part])
    return mx.array(y.reshape(values.shape)).astype(queries.dtype), mx.array(memory.reshape(state.shape))


Floats = npt.NDArray[np.float32]


def _host_chunk(q: Floats, k: Floats, v: Floats, decay: Floats, beta: Floats, memory: Floats, y: Floats) -> None:
    """Compute one chunk: write ``y`` [tokens, key heads, value heads per key head, Dv] and update ``memory``.

    Args:
        q: [tokens, key heads, Dk].
        k: [tokens, key heads, Dk].
        v: [tokens, key heads, value heads per key head, Dv].
        decay: [tokens, key heads, value heads per key head].
        beta: [tokens, key heads, value heads per key head].
        memory: the state, [key heads, value heads per key head * Dv, Dk].
        y: the outputs.
    """
    tokens, key_heads, each, value_dim = v.shape
    both = np.ascontiguousarray(np.concatenate([k, q]).swapaxes(0, 1))  # [key heads, 2 tokens, Dk]
    own = both[:, :tokens]
    decay_rows = decay.transpose(1, 2, 0)
    between = np.zeros((key_heads, each, tokens, tokens), np.float32)
    between[..., 0, 0] = 1
    for t in range(1, tokens):
        np.multiply(between[..., t - 1, :t], decay_rows[..., t, None], out=between[..., t, :t])
        between[..., t, t] = 1
    scores = both @ own.swapaxes(-1, -2)
    inverse = np.eye(tokens, dtype=np.float32)
    below = beta.transpose(1, 2, 0)[..., None] * between * scores[:, None, :tokens]
    for number, mask in enumerate(_corners(tokens)):
        corners = below * mask
        inverse = inverse - (inverse @ corners @ inverse if number else corners)

    # From here on [key heads, tokens, value heads per key head, Dv]: one product for all value heads of a key head.
    begun = np.cumprod(decay, axis=0).swapaxes(0, 1)[..., None]
    found = (both @ memory.swapaxes(-1, -2)).reshape(key_heads, 2 * tokens, each, value_dim)
    recalled, read = found[:, :tokens], found[:, tokens:]
    recalled *= -begun
    recalled += v.swapaxes(0, 1)
    recalled *= beta.swapaxes(0, 1)[..., None]
    change = np.ascontiguousarray((inverse @ recalled.swapaxes(1, 2)).swapaxes(1, 2))
    read *= begun
    read += (between * scores[:, None, tokens:] @ change.swapaxes(1, 2)).swapaxes(1, 2)
    y[:] = read.swapaxes(0, 1)
    change *= between[:, :, -1].swapaxes(1, 2)[..., None]
    memory.reshape(key_heads, each, -1)[:] *= decay.prod(axis=0)[..., None]
    memory += change.reshape(key_heads, tokens, -1).swapaxes(-1, -2) @ own


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def _corners(size: int) -> list[npt.NDArray[np.bool_]]:
    """Return masks of the lower left quarters of all diagonal blocks of 2, 4, 8..., cut off at ``size``."""
    block = np.arange(size) // (1 << np.arange((size - 1).bit_length()))[:, None]
    rows, columns = block[:, :, None], block[:, None, :]
    return list((rows == columns + 1) & (rows % 2 == 1))


def _filled(part: mx.array, missing: int, value: float) -> mx.array:
    if missing == 0:
        return part
    return mx.pad(part, [(0, missing)] + [(0, 0)] * (part.ndim - 1), constant_values=value)


def _as_numpy(array: mx.array) -> Floats:
    """Return ``array`` in f32 as a numpy array, without a copy if it is in f32 already."""
    return np.asarray(array.astype(mx.float32))
