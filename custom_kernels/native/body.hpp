// The operations, over the vectors of a `lanes_*.hpp`. The source of each instruction set includes this file once,
// inside a separate namespace, so that the linker cannot merge code for different machines.

INLINE F exponential(F x) {
    // exp(x) = 2^n exp(r), |r| <= ln(2) / 2; the polynomial is that of Cephes' expf.
    x = smaller(splat(88.0f), larger(splat(-87.0f), x)); // in this order NaN remains NaN
    F n = rounded(x * splat(1.44269504f));
    F r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    F p = fma(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + splat(1.0f));
    return times_power_of_two(p, n);
}

INLINE F sigmoid(F x) { return splat(1.0f) / (splat(1.0f) + exponential(zero() - x)); }

// Call f(i, vector) for all vectors of `count` floats. A partial last vector is a copy; the value that f returns is
// written back.
template <typename Function>
INLINE void over(float* x, int64_t count, Function f) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(x + i, f(i, load(x + i)));
    if (i < count) {
        float last[kLanes] = {};
        std::memcpy(last, x + i, sizeof(float) * (count - i));
        store(last, f(i, load(last)));
        std::memcpy(x + i, last, sizeof(float) * (count - i));
    }
}

INLINE F load_part(const float* x, int64_t i, int64_t count) {
    if (i + kLanes <= count) return load(x + i);
    float last[kLanes] = {};
    std::memcpy(last, x + i, sizeof(float) * (count - i));
    return load(last);
}

void swiglu(float* gate, const float* up, int64_t count) {
    over(gate, count, [&](int64_t i, F g) { return g * sigmoid(g) * load_part(up, i, count); });
}

void multiply_by_sigmoid(float* x, const float* gate, int64_t count) {
    over(x, count, [&](int64_t i, F v) { return v * sigmoid(load_part(gate, i, count)); });
}

// --- norms --------------------------------------------------------------------------------------------------------

INLINE float dot_product(const float* a, const float* b, int64_t count) {
    F first = zero(), second = zero();
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        first = fma(load(a + i), load(b + i), first);
        second = fma(load(a + i + 16), load(b + i + 16), second);
    }
    for (; i < count; i += kLanes) first = fma(load_part(a, i, count), load_part(b, i, count), first);
    return sum(first + second);
}

void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* out) {
    F factor = splat(1.0f / std::sqrt(dot_product(x, x, count) / static_cast<float>(count) + eps));
    std::memcpy(out, x, sizeof(float) * count);
    over(out, count, [&](int64_t i, F v) { return weight ? v * factor * load_part(weight, i, count) : v * factor; });
}

// --- GatedDeltaNet ------------------------------------------------------------------------------------------------

void convolve(const float* conv_state, const float* qkv, const float* weights, int64_t tokens, int64_t channels,
              int64_t taps, int64_t begin, int64_t end, float* mixed) {
    for (int64_t t = 0; t < tokens; ++t) {
        float* out = mixed + t * channels;
        for (int64_t c = begin; c < end; c += kLanes) {
            const int64_t count = end - c < kLanes ? end - c : kLanes;
            F total = zero();
            for (int64_t tap = 0; tap < taps; ++tap) {
                const int64_t row = t + tap - (taps - 1);
                const float* x = row < 0 ? conv_state + (row + taps - 1) * channels : qkv + row * channels;
                F w = count == kLanes ? gather(weights + c * taps + tap, static_cast<int>(taps)) : zero();
                if (count < kLanes) {
                    float partial[kLanes] = {};
                    for (int64_t i = 0; i < count; ++i) partial[i] = weights[(c + i) * taps + tap];
                    w = load(partial);
                }
                total = fma(load_part(x + c, 0, count), w, total);
            }
            float values[kLanes];
            store(values, total * sigmoid(total));
            std::memcpy(out + c, values, sizeof(float) * count);
        }
    }
}

void delta(const DeltaShape& shape, int64_t head, int64_t tokens, const float* mixed, const float* z, const float* b,
           const float* a, const float* a_log, const float* dt_bias, const float* norm, float eps,
           float* recurrent_state,
           float* y, float* scratch) {
    const int64_t dk = shape.key_dim, dv = shape.value_dim, key_head = head / (shape.value_heads / shape.key_heads);
    float *q = scratch, *k = scratch + dk, *out = scratch + 2 * dk;
    const float rate = std::exp(a_log[head]);
    for (int64_t t = 0; t < tokens; ++t) {
        const float* row = mixed + t * shape.channels();
        const float *own_q = row + key_head * dk, *own_k = row + shape.key_width() + key_head * dk;
        const float* v = row + 2 * shape.key_width() + head * dv;
        const float q_factor = 1.0f / std::sqrt(dot_product(own_q, own_q, dk) + 1e-6f) / std::sqrt(static_cast<float>(dk));
        const float k_factor = 1.0f / std::sqrt(dot_product(own_k, own_k, dk) + 1e-6f);
        for (int64_t i = 0; i < dk; i += kLanes) {
            store(q + i, load(own_q + i) * splat(q_factor));
            store(k + i, load(own_k + i) * splat(k_factor));
        }
        const float step = a[t * shape.value_heads + head] + dt_bias[head];
        const float softplus = step > 20.0f ? step : std::log1p(std::exp(step));
        const float decay = std::exp(-rate * softplus);
        const float beta = 1.0f / (1.0f + std::exp(-b[t * shape.value_heads + head]));
        const float k_q = dot_product(k, q, dk);
        // y = (decay S + change k) q = decay (S q) + change (k q): one pass computes both products, the next updates S.
        const F decays = splat(decay);
        for (int64_t d = 0; d < dv; ++d) {
            float* s = recurrent_state + d * dk;
            F with_k = zero(), with_q = zero();
            for (int64_t i = 0; i < dk; i += kLanes) {
                F values = load(s + i);
                with_k = fma(values, load(k + i), with_k);
                with_q = fma(values, load(q + i), with_q);
            }
            const float change = beta * (v[d] - decay * sum(with_k));
            out[d] = decay * sum(with_q) + change * k_q;
            const F changes = splat(change);
            for (int64_t i = 0; i < dk; i += kLanes)
                store(s + i, fma(load(s + i), decays, changes * load(k + i)));
        }
        float* y_row = y + t * shape.value_width() + head * dv;
        rms_norm(out, norm, dv, eps, y_row);
        const float* z_row = z + t * shape.value_width() + head * dv;
        for (int64_t i = 0; i < dv; i += kLanes) {
            F g = load(z_row + i);
            store(y_row + i, load(y_row + i) * (g * sigmoid(g)));
        }
    }
}

// --- attention ----------------------------------------------------------------------------------------------------

#include "kv_rows.hpp"

constexpr int64_t kSpan = 64;  // keys per step
constexpr int kHeadsAtOnce = 4;

template <int HEADS>
INLINE void score(const float* queries, int64_t dim, const float* keys, int64_t count, float scale, float* scores) {
    for (int64_t n = 0; n < count; ++n) {
        F total[HEADS];
        for (int h = 0; h < HEADS; ++h) total[h] = zero();
        for (int64_t i = 0; i < dim; i += kLanes) {
            F k = load(keys + n * dim + i);
            for (int h = 0; h < HEADS; ++h) total[h] = fma(load(queries + h * dim + i), k, total[h]);
        }
        for (int h = 0; h < HEADS; ++h) scores[h * kSpan + n] = sum(total[h]) * scale;
    }
}

template <int HEADS>
INLINE void accumulate(const float* weights, const float* values, int64_t count, int64_t dim, float* sums) {
    for (int64_t i = 0; i < dim; i += kLanes) {
        F total[HEADS];
        for (int h = 0; h < HEADS; ++h) total[h] = load(sums + h * dim + i);
        for (int64_t n = 0; n < count; ++n) {
            F v = load(values + n * dim + i);
            for (int h = 0; h < HEADS; ++h) total[h] = fma(splat(weights[h * kSpan + n]), v, total[h]);
        }
        for (int h = 0; h < HEADS; ++h) store(sums + h * dim + i, total[h]);
    }
}

void attend(const float* queries, int64_t heads, const RowFormat& rows, const uint8_t* all_keys,
            const uint8_t* all_values, int64_t begin, int64_t end, float* sums, float* peaks, float* scratch) {
    const int64_t dim = rows.dim;
    float* widened = scratch + heads * kSpan;
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    std::memset(sums, 0, sizeof(float) * heads * dim);
    for (int64_t h = 0; h < heads; ++h) peaks[2 * h] = -INFINITY, peaks[2 * h + 1] = 0.0f;
    for (int64_t n = begin; n < end; n += kSpan) {
        const int64_t count = end - n < kSpan ? end - n : kSpan;
        const float* keys = load_rows(rows, all_keys, n, count, widened);
        int64_t h = 0;
        for (; h + kHeadsAtOnce <= heads; h += kHeadsAtOnce)
            score<kHeadsAtOnce>(queries + h * dim, dim, keys, count, scale, scratch + h * kSpan);
        for (; h < heads; ++h) score<1>(queries + h * dim, dim, keys, count, scale, scratch + h * kSpan);
        for (h = 0; h < heads; ++h) {
            float* own = scratch + h * kSpan;
            for (int64_t i = count; i < kSpan; ++i) own[i] = -INFINITY;
            F most = load(own);
            for (int64_t i = kLanes; i < kSpan; i += kLanes) most = larger(most, load(own + i));
            const float previous = peaks[2 * h], peak = std::fmax(previous, largest(most));
            if (peak > previous) {
                const float factor = std::exp(previous - peak);
                peaks[2 * h] = peak, peaks[2 * h + 1] *= factor;
                for (int64_t i = 0; i < dim; i += kLanes)
                    store(sums + h * dim + i, load(sums + h * dim + i) * splat(factor));
            }
            F total = zero();
            for (int64_t i = 0; i < count; i += kLanes) {
                F weights = exponential(load(own + i) - splat(peak));
                store(own + i, weights);
            }
            for (int64_t i = count; i < kSpan; ++i) own[i] = 0.0f;
            for (int64_t i = 0; i < kSpan; i += kLanes) total = total + load(own + i);
            peaks[2 * h + 1] += sum(total);
        }
        const float* values = load_rows(rows, all_values, n, count, widened);
        for (h = 0; h + kHeadsAtOnce <= heads; h += kHeadsAtOnce)
            accumulate<kHeadsAtOnce>(scratch + h * kSpan, values, count, dim, sums + h * dim);
        for (; h < heads; ++h) accumulate<1>(scratch + h * kSpan, values, count, dim, sums + h * dim);
    }
}

#include "attend_many.hpp"

const Operations operations = {
    kName,
    vector_bytes,
    prepare,
    dot,
    {kFloatBlock, kPanelRows, kFewTokens, float_vector_bytes, arrange_floats, panel_floats, multiply_floats},
    {kByteBlock, kPanelRows, 2, byte_vector_bytes, arrange_bytes, panel_floats, multiply_bytes},
    {kFloatBlock, kPanelRows, kFewTokens, float_vector_bytes, arrange_rounded, panel_floats, multiply_floats},
    swiglu,
    convolve,
    delta,
    rms_norm,
    store_row,
    attend,
    tokens_of_block,
    attend_many_floats,
    attend_many,
    multiply_by_sigmoid,
};
