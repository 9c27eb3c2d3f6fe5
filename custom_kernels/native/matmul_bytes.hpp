// Products of many vectors of bytes: in each group x = scale * byte. A block holds words of four bytes [columns / 4][vector], then
// scales and sums of the groups, [group][vector]. A lane of codes becomes steps of four: byte b of step j is code
// j + b * steps. Included after `panel.hpp`.

int64_t byte_vector_bytes(int64_t columns, int group) { return columns + 8 * (columns / group); }

void arrange_bytes(const float* const* x, int count, int64_t columns, int bits, int group, uint8_t* to) {
    const int per_lane = codes_per_lane(bits), steps = per_lane / 4;
    float *scales = reinterpret_cast<float*>(to + count * columns), *sums = scales + columns / group * count;
    for (int t = 0; t < count; ++t)
        for (int64_t g = 0; g < columns / group; ++g) {
            const float* own = x[t] + g * group;
            F most = zero(), nothing = zero();
            for (int i = 0; i < group; i += kLanes) {
                const F values = load(own + i);
                most = larger(most, larger(values, zero() - values));
                nothing = fma(values, zero(), nothing); // or NaN
            }
            const bool finite = sum(nothing) == 0.0f;
            const float peak = largest(most);
            const float scale = !finite ? NAN : peak < 1e-30f ? 0.0f : peak / 127.0f;
            const F inverse = splat(finite && scale > 0.0f ? 127.0f / peak : 0.0f);
            alignas(64) float whole[128];
            uint32_t words[128];
            F total = zero();
            for (int i = 0; i < group; i += kLanes) {
                const F values = finite ? rounded(load(own + i) * inverse) : zero();
                store(whole + i, values);
                total = total + values;
            }
            scales[g * count + t] = scale;
            sums[g * count + t] = scale * sum(total);
            for (int i = 0; i < group; ++i) words[i] = static_cast<uint8_t>(static_cast<int8_t>(whole[i]));
            uint32_t* out = reinterpret_cast<uint32_t*>(to) + g * (group / 4) * count + t;
            for (int lane = 0; lane < group; lane += per_lane)
                for (int step = lane; step < lane + steps; ++step, out += count)
                    *out = words[step] | words[step + steps] << 8 | words[step + 2 * steps] << 16 |
                           words[step + 3 * steps] << 24;
        }
}

// Store the steps of a word.
template <int BITS>
INLINE void unpack_bytes(W word, uint32_t* to) {
    if constexpr (BITS == 8) {
        store_words(to, word);
    } else if constexpr (BITS == kFloat4) {
        const W mask = splat_word(0x0f0f0f0f);
        store_words(to, float4_codes(word & mask));
        store_words(to + kPanelRows, float4_codes(shift_right<4>(word) & mask));
    } else if constexpr (BITS == 4) {
        const W mask = splat_word(0x0f0f0f0f);
        store_words(to, word & mask);
        store_words(to + kPanelRows, shift_right<4>(word) & mask);
    } else if constexpr (BITS == 3) {
        const W halves = in_halves(word), mask = splat_word(0x07070707);
        const W pairs = (halves & splat_word(0x003f003f)) | shift_left<2>(halves & splat_word(0x0fc00fc0));
        store_words(to, pairs & mask);
        store_words(to + kPanelRows, shift_right<3>(pairs) & mask);
    } else {
        const W mask = splat_word(0x03030303);
        store_words(to, word & mask);
        store_words(to + kPanelRows, shift_right<2>(word) & mask);
        store_words(to + 2 * kPanelRows, shift_right<4>(word) & mask);
        store_words(to + 3 * kPanelRows, shift_right<6>(word) & mask);
    }
}

template <int BITS>
INLINE void fill_bytes(const Matrix& m, const Panel& panel, int64_t first, int64_t from, int64_t to) {
    constexpr int per_lane = codes_per_lane(BITS);
    for (int64_t at = from; at < to; at += kChunk<BITS>)
        for (int v = 0; v < kPanelVectors; ++v) {
            W words[16];
            load_chunk<BITS>(m, first + 16 * v, at / kChunk<BITS>, words);
            for (int64_t i = 0; i < 16 && at + i * per_lane < to; ++i)
                unpack_bytes<BITS>(words[i], panel.words + (at - from + i * per_lane) / 4 * kPanelRows + 16 * v);
        }
}

// The part of a block of vectors that belongs to some groups.
struct ByteBlock {
    const uint32_t* words;
    const float *scales, *sums;
};

template <bool WIDE, int COUNT>
void add_bytes(const uint32_t* panel, const float* scales, const float* biases, int64_t groups, int steps,
               const ByteBlock& x, float* tile) {
    F total[COUNT][kPanelVectors];
#pragma GCC unroll 8
    for (int t = 0; t < COUNT; ++t)
#pragma GCC unroll 2
        for (int v = 0; v < kPanelVectors; ++v) total[t][v] = load(tile + t * kPanelRows + 16 * v);
    const uint32_t* bytes = x.words;
    for (int64_t g = 0; g < groups; ++g) {
        W own[COUNT][kPanelVectors];
#pragma GCC unroll 8
        for (int t = 0; t < COUNT; ++t)
#pragma GCC unroll 2
            for (int v = 0; v < kPanelVectors; ++v) own[t][v] = splat_word(0);
        for (int step = 0; step < steps; ++step, panel += kPanelRows, bytes += COUNT) {
            W w[kPanelVectors];
#pragma GCC unroll 2
            for (int v = 0; v < kPanelVectors; ++v) w[v] = load_words(panel + 16 * v);
#pragma GCC unroll 8
            for (int t = 0; t < COUNT; ++t)
#pragma GCC unroll 2
                for (int v = 0; v < kPanelVectors; ++v) own[t][v] = add_products<WIDE>(own[t][v], w[v], bytes[t]);
        }
#pragma GCC unroll 2
        for (int v = 0; v < kPanelVectors; ++v) {
            const F s = load(scales + g * kPanelRows + 16 * v), b = load(biases + g * kPanelRows + 16 * v);
#pragma GCC unroll 8
            for (int t = 0; t < COUNT; ++t)
                total[t][v] = fma(to_floats(own[t][v]), s * splat(x.scales[g * COUNT + t]),
                                  fma(b, splat(x.sums[g * COUNT + t]), total[t][v]));
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < COUNT; ++t)
#pragma GCC unroll 2
        for (int v = 0; v < kPanelVectors; ++v) store(tile + t * kPanelRows + 16 * v, total[t][v]);
}

template <bool WIDE, int COUNT>
INLINE void add_block_of_bytes(int count, const uint32_t* panel, const float* scales, const float* biases,
                               int64_t groups, int steps, const ByteBlock& x, float* tile) {
    if (count == COUNT) return add_bytes<WIDE, COUNT>(panel, scales, biases, groups, steps, x, tile);
    if constexpr (COUNT > 1)
        add_block_of_bytes<WIDE, COUNT - 1>(count, panel, scales, biases, groups, steps, x, tile);
}

template <int BITS>
void multiply_bytes_typed(const Matrix& m, int64_t first, int64_t tokens, const uint8_t* arranged, float* tile,
                          float* scratch) {
    const Panel panel(m, first, scratch);
    const Parts blocks(tokens, kByteBlock);
    std::memset(tile, 0, sizeof(float) * tokens * kPanelRows);
    for (int64_t from = 0; from < m.columns; from += 4 * kPanelWords) {
        const int64_t to = from + 4 * kPanelWords < m.columns ? from + 4 * kPanelWords : m.columns, g = from / m.group;
        fill_bytes<BITS>(m, panel, first, from, to);
        for (int64_t i = 0; i < blocks.parts; ++i) {
            const int64_t begin = blocks.begin(i);
            const int count = static_cast<int>(blocks.size(i));
            const uint8_t* block = arranged + begin * byte_vector_bytes(m.columns, m.group);
            const float* factors = reinterpret_cast<const float*>(block + count * m.columns);
            const ByteBlock x{reinterpret_cast<const uint32_t*>(block) + from / 4 * count, factors + g * count,
                              factors + (m.groups() + g) * count};
            add_block_of_bytes<(BITS > 4), kByteBlock>(
                count, panel.words, panel.scales + g * kPanelRows, panel.biases + g * kPanelRows,
                (to - from) / m.group, m.group / 4, x, tile + begin * kPanelRows);
        }
    }
}

void multiply_bytes(const Matrix& m, int64_t first, int64_t tokens, const uint8_t* arranged, float* tile,
                    float* scratch) {
    FOR_BITS(multiply_bytes_typed, first, tokens, arranged, tile, scratch)
}
