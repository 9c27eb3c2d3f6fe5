"""Weighted sums of rows, in elementary operations."""

import mlx.core as mx


def add_rows(y: mx.array, rows: mx.array, places: mx.array, weights: mx.array) -> mx.array:
    """Return ``y`` plus, for each token, the weighted sum of some rows; selected by the CPU, as in the embedding.

    Args:
        y: f32 [T, width].
        rows: [R, width].
        places: the rows of each token, int32 [T, K]; -1 for none.
        weights: f32 [T, K].

    Returns:
        f32 [T, width]; terms are added in ascending order of K, and their sum to ``y``.
    """
    return _sums(y, rows, places, weights, mx.cpu)


def by_mlx(y: mx.array, rows: mx.array, places: mx.array, weights: mx.array) -> mx.array:
    """Compute ``add_rows`` on the default device."""
    return _sums(y, rows, places, weights, None)


def _sums(y: mx.array, rows: mx.array, places: mx.array, weights: mx.array, device: mx.DeviceType | None) -> mx.array:
    factors = mx.where(places >= 0, weights, 0)
    total = mx.zeros(y.shape, mx.float32)
    for k in range(places.shape[1]):
        picked = mx.take(rows, mx.maximum(places[:, k], 0), axis=0, stream=device)
        total = total + factors[:, k : k + 1] * picked.astype(mx.float32)
    return y + total
