// Products of many vectors of floats. A block of vectors is [column][vector]; included after `panel.hpp`.

int64_t float_vector_bytes(int64_t columns, int) { return 4 * columns; }

void arrange_floats(const float* const* x, int count, int64_t columns, int, int, uint8_t* to) {
    float* out = reinterpret_cast<float*>(to);
    for (int64_t k = 0; k < columns; k += 16) // few columns at once, so that their cache lines are written once
        for (int t = 0; t < count; ++t)
            for (int64_t i = k; i < k + 16; ++i) out[i * count + t] = x[t][i];
}

// Round to bf16, to the nearest and to even; NaN and infinities stay.
INLINE float round_to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7f800000) != 0x7f800000) bits += 0x7fff + (bits >> 16 & 1);
    else if (bits & 0x007fffff) bits |= 0x00400000; // a NaN whose lower half alone is not zero
    bits &= 0xffff0000;
    std::memcpy(&x, &bits, 4);
    return x;
}

void arrange_rounded(const float* const* x, int count, int64_t columns, int bits, int group, uint8_t* to) {
    arrange_floats(x, count, columns, bits, group, to);
    float* values = reinterpret_cast<float*>(to);
    for (int64_t i = 0; i < count * columns; ++i) values[i] = round_to_bf16(values[i]);
}

template <int BITS, int J>
INLINE void unpack_floats(W word, F s, F b, float* to) {
    store(to + J * kPanelRows, fma(value<BITS, J>(word), s, b));
    if constexpr (J + 1 < codes_per_lane(BITS)) unpack_floats<BITS, J + 1>(word, s, b, to);
}

// Store the dense columns [from, to) of a panel.
template <int BITS>
INLINE void fill_floats(const Matrix& m, const Panel& panel, int64_t first, int64_t from, int64_t to) {
    constexpr int per_lane = codes_per_lane(BITS);
    float* dense = reinterpret_cast<float*>(panel.words);
    for (int64_t at = from; at < to; at += kChunk<BITS>)
        for (int v = 0; v < kPanelVectors; ++v) {
            W words[16];
            load_chunk<BITS>(m, first + 16 * v, at / kChunk<BITS>, words);
            for (int64_t i = 0; i < 16 && at + i * per_lane < to; ++i) {
                const int64_t column = at + i * per_lane, factors = column / m.group * kPanelRows + 16 * v;
                unpack_floats<BITS, 0>(words[i], load(panel.scales + factors), load(panel.biases + factors),
                                       dense + (column - from) * kPanelRows + 16 * v);
            }
        }
}

template <int COUNT>
void add_floats(const float* panel, int64_t columns, const float* x, float* tile) {
    F total[COUNT][kPanelVectors];
#pragma GCC unroll 16
    for (int t = 0; t < COUNT; ++t)
#pragma GCC unroll 2
        for (int v = 0; v < kPanelVectors; ++v) total[t][v] = load(tile + t * kPanelRows + 16 * v);
    for (int64_t k = 0; k < columns; ++k) {
        F w[kPanelVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kPanelVectors; ++v) w[v] = load(panel + k * kPanelRows + 16 * v);
#pragma GCC unroll 16
        for (int t = 0; t < COUNT; ++t) {
            const F own = splat(x[k * COUNT + t]);
#pragma GCC unroll 2
            for (int v = 0; v < kPanelVectors; ++v) total[t][v] = fma(w[v], own, total[t][v]);
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < COUNT; ++t)
#pragma GCC unroll 2
        for (int v = 0; v < kPanelVectors; ++v) store(tile + t * kPanelRows + 16 * v, total[t][v]);
}

// Call the instance of a function for `count` vectors.
template <int COUNT>
INLINE void add_block_of_floats(int count, const float* panel, int64_t columns, const float* x, float* tile) {
    if (count == COUNT) return add_floats<COUNT>(panel, columns, x, tile);
    if constexpr (COUNT > 1) add_block_of_floats<COUNT - 1>(count, panel, columns, x, tile);
}

template <int BITS>
void multiply_floats_typed(const Matrix& m, int64_t first, int64_t tokens, const uint8_t* arranged, float* tile,
                           float* scratch) {
    constexpr int64_t depth = kChunk<BITS> > kPanelWords ? kChunk<BITS> : kPanelWords;
    const Panel panel(m, first, scratch);
    const Parts blocks(tokens, kFloatBlock);
    std::memset(tile, 0, sizeof(float) * tokens * kPanelRows);
    for (int64_t from = 0; from < m.columns; from += depth) {
        const int64_t to = from + depth < m.columns ? from + depth : m.columns;
        fill_floats<BITS>(m, panel, first, from, to);
        for (int64_t i = 0; i < blocks.parts; ++i) {
            const int64_t begin = blocks.begin(i);
            const int count = static_cast<int>(blocks.size(i));
            const float* x = reinterpret_cast<const float*>(arranged) + begin * m.columns + from * count;
            add_block_of_floats<kFloatBlock>(count, reinterpret_cast<const float*>(panel.words), to - from, x,
                                             tile + begin * kPanelRows);
        }
    }
}

void multiply_floats(const Matrix& m, int64_t first, int64_t tokens, const uint8_t* arranged, float* tile,
                     float* scratch) {
    FOR_BITS(multiply_floats_typed, first, tokens, arranged, tile, scratch)
}
