// Products of many vectors in bf16, in which codes are exact. A block of vectors holds words of two values
// [columns / 2][vector], then the sums of the groups, [group][vector]. A lane of codes becomes steps of two: half b of
// step j is code j + b * steps. Included after `panel.hpp`, for AVX-512 with BF16.

constexpr int kBf16Block = 6;

int64_t bf16_vector_bytes(int64_t columns, int group) { return 2 * columns + 4 * (columns / group); }

void arrange_bf16(const float* const* x, int count, int64_t columns, int bits, int group, uint8_t* to) {
    const int per_lane = codes_per_lane(bits), steps = per_lane / 2;
    float* sums = reinterpret_cast<float*>(to + 2 * count * columns);
    for (int t = 0; t < count; ++t)
        for (int64_t g = 0; g < columns / group; ++g) {
            uint16_t halves[128];
            F total = zero();
            for (int i = 0; i < group; i += kLanes) {
                const __m256i rounded_values = (__m256i)_mm512_cvtneps_pbh(load(x[t] + g * group + i).v);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(halves + i), rounded_values);
                total = total + F{_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded_values), 16))};
            }
            sums[g * count + t] = sum(total);
            uint32_t* out = reinterpret_cast<uint32_t*>(to) + g * (group / 2) * count + t;
            for (int lane = 0; lane < group; lane += per_lane)
                for (int step = lane; step < lane + steps; ++step, out += count)
                    *out = halves[step] | static_cast<uint32_t>(halves[step + steps]) << 16;
        }
}

// Store the steps of a word.
template <int BITS, int STEP>
INLINE void unpack_bf16(W word, uint32_t* to) {
    if constexpr (BITS == 8) { // the upper halves of floats
        const W low = {_mm512_castps_si512(to_floats(shift_right<8 * STEP>(word) & splat_word(255)).v)};
        const W high = {_mm512_castps_si512(to_floats(shift_right<8 * STEP + 16>(word) & splat_word(255)).v)};
        store_words(to, shift_right<16>(low) | high);
    } else {
        alignas(64) static constexpr uint16_t values[16] = {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
                                                            0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130,
                                                            0x4140, 0x4150, 0x4160, 0x4170}; // 0 to 15
        alignas(64) static constexpr uint16_t of_float4[16] = {0x4140, 0x4150, 0x4160, 0x4170, 0x4180, 0x4190,
                                                               0x41a0, 0x41c0, 0x4140, 0x4130, 0x4120, 0x4110,
                                                               0x4100, 0x40c0, 0x4080, 0x0000}; // kFloat4Codes
        const __m512i table = _mm512_broadcast_i64x4(
            _mm256_load_si256(reinterpret_cast<const __m256i*>(BITS == kFloat4 ? of_float4 : values)));
        const W halves = shift_right<width(BITS) * STEP>(BITS == 3 ? in_halves(word) : word);
        const W own = halves & splat_word(((1u << width(BITS)) - 1) * 0x10001u);
        store_words(to, {_mm512_permutexvar_epi16(own.v, table)});
    }
    if constexpr (STEP + 1 < codes_per_lane(BITS) / 2) unpack_bf16<BITS, STEP + 1>(word, to + kPanelRows);
}

template <int BITS>
INLINE void fill_bf16(const Matrix& m, const Panel& panel, int64_t first, int64_t from, int64_t to) {
    constexpr int per_lane = codes_per_lane(BITS);
    for (int64_t at = from; at < to; at += kChunk<BITS>)
        for (int v = 0; v < kPanelVectors; ++v) {
            W words[16];
            load_chunk<BITS>(m, first + 16 * v, at / kChunk<BITS>, words);
            for (int64_t i = 0; i < 16 && at + i * per_lane < to; ++i)
                unpack_bf16<BITS, 0>(words[i], panel.words + (at - from + i * per_lane) / 2 * kPanelRows + 16 * v);
        }
}

template <int COUNT>
void add_bf16(const uint32_t* panel, const float* scales, const float* biases, int64_t groups, int steps,
              const uint32_t* x, const float* sums, float* tile) {
    F total[COUNT][kPanelVectors];
#pragma GCC unroll 8
    for (int t = 0; t < COUNT; ++t)
#pragma GCC unroll 2
        for (int v = 0; v < kPanelVectors; ++v) total[t][v] = load(tile + t * kPanelRows + 16 * v);
    for (int64_t g = 0; g < groups; ++g) {
        F own[COUNT][kPanelVectors];
#pragma GCC unroll 8
        for (int t = 0; t < COUNT; ++t)
#pragma GCC unroll 2
            for (int v = 0; v < kPanelVectors; ++v) own[t][v] = zero();
        for (int step = 0; step < steps; ++step, panel += kPanelRows, x += COUNT) {
            __m512bh w[kPanelVectors];
#pragma GCC unroll 2
            for (int v = 0; v < kPanelVectors; ++v) w[v] = (__m512bh)load_words(panel + 16 * v).v;
#pragma GCC unroll 8
            for (int t = 0; t < COUNT; ++t) {
                const __m512bh pair = (__m512bh)splat_word(x[t]).v;
#pragma GCC unroll 2
                for (int v = 0; v < kPanelVectors; ++v) own[t][v] = {_mm512_dpbf16_ps(own[t][v].v, w[v], pair)};
            }
        }
#pragma GCC unroll 2
        for (int v = 0; v < kPanelVectors; ++v) {
            const F s = load(scales + g * kPanelRows + 16 * v), b = load(biases + g * kPanelRows + 16 * v);
#pragma GCC unroll 8
            for (int t = 0; t < COUNT; ++t)
                total[t][v] = fma(own[t][v], s, fma(b, splat(sums[g * COUNT + t]), total[t][v]));
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < COUNT; ++t)
#pragma GCC unroll 2
        for (int v = 0; v < kPanelVectors; ++v) store(tile + t * kPanelRows + 16 * v, total[t][v]);
}

template <int COUNT>
INLINE void add_block_of_bf16(int count, const uint32_t* panel, const float* scales, const float* biases,
                              int64_t groups, int steps, const uint32_t* x, const float* sums, float* tile) {
    if (count == COUNT) return add_bf16<COUNT>(panel, scales, biases, groups, steps, x, sums, tile);
    if constexpr (COUNT > 1)
        add_block_of_bf16<COUNT - 1>(count, panel, scales, biases, groups, steps, x, sums, tile);
}

template <int BITS>
void multiply_bf16_typed(const Matrix& m, int64_t first, int64_t tokens, const uint8_t* arranged, float* tile,
                         float* scratch) {
    const Panel panel(m, first, scratch);
    const Parts blocks(tokens, kBf16Block);
    std::memset(tile, 0, sizeof(float) * tokens * kPanelRows);
    for (int64_t from = 0; from < m.columns; from += 2 * kPanelWords) {
        const int64_t to = from + 2 * kPanelWords < m.columns ? from + 2 * kPanelWords : m.columns, g = from / m.group;
        fill_bf16<BITS>(m, panel, first, from, to);
        for (int64_t i = 0; i < blocks.parts; ++i) {
            const int64_t begin = blocks.begin(i);
            const int count = static_cast<int>(blocks.size(i));
            const uint8_t* block = arranged + begin * bf16_vector_bytes(m.columns, m.group);
            const float* sums = reinterpret_cast<const float*>(block + 2 * count * m.columns);
            add_block_of_bf16<kBf16Block>(count, panel.words, panel.scales + g * kPanelRows,
                                          panel.biases + g * kPanelRows, (to - from) / m.group, m.group / 2,
                                          reinterpret_cast<const uint32_t*>(block) + from / 2 * count,
                                          sums + g * count, tile + begin * kPanelRows);
        }
    }
}

void multiply_bf16(const Matrix& m, int64_t first, int64_t tokens, const uint8_t* arranged, float* tile,
                   float* scratch) {
    FOR_BITS(multiply_bf16_typed, first, tokens, arranged, tile, scratch)
}
