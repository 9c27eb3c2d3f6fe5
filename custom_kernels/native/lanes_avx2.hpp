// Sixteen floats in two registers.
#pragma once

struct F {
    __m256 low, high;
};
struct W {
    __m256i low, high;
};

INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE F splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, F a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
}
INLINE F operator+(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
INLINE F operator-(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
INLINE F operator*(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
INLINE F operator/(F a, F b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
INLINE F fma(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE F larger(F a, F b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
INLINE F smaller(F a, F b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
INLINE F rounded(F a) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.low, nearest), _mm256_round_ps(a.high, nearest)};
}
INLINE __m256 power_of_two(__m256 whole) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
INLINE F times_power_of_two(F a, F whole) {
    return {_mm256_mul_ps(a.low, power_of_two(whole.low)), _mm256_mul_ps(a.high, power_of_two(whole.high))};
}

INLINE float sum(F a) {
    __m256 b = _mm256_add_ps(a.low, a.high);
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
INLINE float largest(F a) {
    __m256 b = _mm256_max_ps(a.low, a.high);
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

template <Scale TYPE>
INLINE F load_scales(const uint8_t* p) {
    if constexpr (TYPE == Scale::f32) return load(reinterpret_cast<const float*>(p));
    if constexpr (TYPE == Scale::e8m0) {
        const __m128i half = _mm_subs_epu8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi8(1));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(half), 23)),
                _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(half, 8)), 23))};
    }
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16));
    if constexpr (TYPE == Scale::f16) return {_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)};
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(low), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(high), 16))};
}

// Load sixteen consecutive codes of 8 or 4 bits.
template <int BITS>
INLINE F sixteen_codes(const uint8_t* p) {
    __m128i bytes;
    if constexpr (BITS == 8) {
        bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    } else {
        const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
        bytes = _mm_unpacklo_epi8(_mm_and_si128(pairs, mask), _mm_and_si128(_mm_srli_epi16(pairs, 4), mask));
    }
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}

INLINE F gather(const float* p, int stride) {
    const __m256i index = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(stride));
    return {_mm256_i32gather_ps(p, index, 4), _mm256_i32gather_ps(p + 8 * stride, index, 4)};
}

// Load 24 bytes by two overlapping loads, so that no other byte is read.
INLINE __m256i load_24_bytes(const uint8_t* p) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8));
    return _mm256_set_m128i(
        _mm_shuffle_epi8(high, _mm_setr_epi8(4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1)),
        _mm_shuffle_epi8(low, _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1)));
}

template <int BITS>
INLINE W load_codes(const uint8_t* p) {
    if constexpr (BITS == 3) return {load_24_bytes(p), load_24_bytes(p + 24)};
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}

template <int BITS, int J>
INLINE F decode(W w) {
    const __m256i mask = _mm256_set1_epi32((1 << BITS) - 1);
    return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(w.low, J * BITS), mask)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(w.high, J * BITS), mask))};
}

// Return a vector whose lane i is element kGroupOfLane<PER_GROUP>.of[16 * chunk + i] of `block`.
template <int PER_GROUP>
INLINE F spread(F block, int chunk) {
    const int32_t* index = kGroupOfLane<PER_GROUP>.of + 16 * chunk; // the permutation uses three bits of it
    const __m256 half = 2 * chunk < PER_GROUP ? block.low : block.high;
    return {_mm256_permutevar8x32_ps(half, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index))),
            _mm256_permutevar8x32_ps(half, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index + 8)))};
}

// Fetch a line into the second-level cache. A core waits for fewer lines at once for its first-level cache: on Zen 4 that
// halves the speed of one core (docs/measurements/2026-11-26-cpu-steps.md).
INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

constexpr int kTokens = 2;  // vectors that share a pass over the codes

// --- for products of many vectors: words of 32 bits

INLINE W operator&(W a, W b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
INLINE W operator|(W a, W b) { return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)}; }
template <int N>
INLINE W shift_right(W a) {
    return {_mm256_srli_epi32(a.low, N), _mm256_srli_epi32(a.high, N)};
}
template <int N>
INLINE W shift_left(W a) {
    return {_mm256_slli_epi32(a.low, N), _mm256_slli_epi32(a.high, N)};
}
INLINE W splat_word(uint32_t x) {
    const __m256i all = _mm256_set1_epi32(static_cast<int>(x));
    return {all, all};
}
INLINE W load_words(const uint32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
INLINE void store_words(uint32_t* p, W a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.high);
}
INLINE F to_floats(W a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }

// Return the integers of bytes with codes of mxfp4; bytes above 127 become 0.
INLINE W float4_codes(W a) {
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kFloat4Codes)));
    return {_mm256_shuffle_epi8(table, a.low), _mm256_shuffle_epi8(table, a.high)};
}

// Return code J of each lane in mxfp4, as its integer.
template <int J>
INLINE F float4(W w) {
    return to_floats(float4_codes((shift_right<J * 4>(w) & splat_word(15)) | splat_word(0x80808000)));
}

// Transpose 8 rows of 8 words.
INLINE void transpose_eight(__m256i* rows) {
    __m256i a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        a[2 * i] = _mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}

// Transpose 16 rows of 16 words.
INLINE void transpose(W* rows) {
    __m256i quarter[4][8]; // upper left, upper right, lower left, lower right
    for (int i = 0; i < 8; ++i) {
        quarter[0][i] = rows[i].low, quarter[1][i] = rows[i].high;
        quarter[2][i] = rows[i + 8].low, quarter[3][i] = rows[i + 8].high;
    }
    for (auto& own : quarter) transpose_eight(own);
    for (int i = 0; i < 8; ++i) {
        rows[i] = {quarter[0][i], quarter[2][i]};
        rows[i + 8] = {quarter[1][i], quarter[3][i]};
    }
}

template <bool WIDE>
INLINE __m256i add_products(__m256i sum, __m256i codes, __m256i bytes) {
    const __m256i ones = _mm256_set1_epi16(1), half = _mm256_set1_epi8(15);
    const __m256i low = _mm256_madd_epi16(_mm256_maddubs_epi16(WIDE ? _mm256_and_si256(codes, half) : codes, bytes), ones);
    if constexpr (!WIDE) return _mm256_add_epi32(sum, low);
    const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(codes, 4), half);
    const __m256i high = _mm256_madd_epi16(_mm256_maddubs_epi16(upper, bytes), ones);
    return _mm256_add_epi32(_mm256_add_epi32(sum, low), _mm256_slli_epi32(high, 4));
}

// Add to each lane of `sum` the products of its four bytes, unsigned `codes` and the signed bytes of `x`. WIDE codes
// exceed 15, and their sums in 16 bits would overflow, so their halves are multiplied apart.
template <bool WIDE>
INLINE W add_products(W sum, W codes, uint32_t x) {
    const __m256i bytes = _mm256_set1_epi32(static_cast<int>(x));
    return {add_products<WIDE>(sum.low, codes.low, bytes), add_products<WIDE>(sum.high, codes.high, bytes)};
}

constexpr int kPanelVectors = 1; // vectors of rows in a panel
constexpr int kFloatBlock = 6;   // vectors that share a pass over a panel
constexpr int kByteBlock = 4;
