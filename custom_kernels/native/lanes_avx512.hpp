// Sixteen floats in one register.
#pragma once

struct F {
    __m512 v;
};
struct W {
    __m512i v;
};

INLINE F zero() { return {_mm512_setzero_ps()}; }
INLINE F splat(float x) { return {_mm512_set1_ps(x)}; }
INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE F larger(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE F smaller(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE F rounded(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
INLINE F times_power_of_two(F a, F whole) { return {_mm512_scalef_ps(a.v, whole.v)}; }

INLINE __m256 upper(__m512 a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)); }
INLINE float sum(F a) {
    __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a.v), upper(a.v));
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
INLINE float largest(F a) { return _mm512_reduce_max_ps(a.v); }

template <Scale TYPE>
INLINE F load_scales(const uint8_t* p) {
    if constexpr (TYPE == Scale::f32) return {_mm512_loadu_ps(p)};
    if constexpr (TYPE == Scale::e8m0) {
        const __m128i half = _mm_subs_epu8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi8(1));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(half), 23))};
    }
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (TYPE == Scale::f16) return {_mm512_cvtph_ps(half)};
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}

// Load sixteen consecutive codes of 8 or 4 bits.
template <int BITS>
INLINE F sixteen_codes(const uint8_t* p) {
    if constexpr (BITS == 8)
        return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(pairs, mask), high = _mm_and_si128(_mm_srli_epi16(pairs, 4), mask);
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high)))};
}

INLINE F gather(const float* p, int stride) {
    const __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_i32gather_ps(_mm512_mullo_epi32(index, _mm512_set1_epi32(stride)), p, 4)};
}

template <int BITS>
INLINE W load_codes(const uint8_t* p) {
    if constexpr (BITS != 3) return {_mm512_loadu_si512(p)};
    __m512i words = _mm512_maskz_loadu_epi32(0xfff, p);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
    return {_mm512_shuffle_epi8(_mm512_permutexvar_epi32(lanes, words), bytes)};
}

template <int BITS, int J>
INLINE F decode(W w) {
    __m512i shifted = J ? _mm512_srli_epi32(w.v, J * BITS) : w.v;
    if constexpr (BITS == 8) return {_mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(255)))};
    // A table lookup uses the low four bits of a lane, without a mask or a conversion.
    const __m512 table = BITS == 2   ? _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3)
                         : BITS == 3 ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7)
                                     : _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_permutexvar_ps(shifted, table)};
}

// Return code J of each lane in mxfp4, as its integer.
template <int J>
INLINE F float4(W w) {
    const __m512 table = _mm512_setr_ps(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    return {_mm512_permutexvar_ps(J ? _mm512_srli_epi32(w.v, J * 4) : w.v, table)};
}

// Return a vector whose lane i is element kGroupOfLane<PER_GROUP>.of[16 * chunk + i] of `block`.
template <int PER_GROUP>
INLINE F spread(F block, int chunk) {
    const int32_t* index = kGroupOfLane<PER_GROUP>.of + 16 * chunk;
    return {_mm512_permutexvar_ps(_mm512_loadu_si512(index), block.v)};
}

// Fetch a line into the second-level cache. A core waits for fewer lines at once for its first-level cache: on Zen 4 that
// halves the speed of one core (docs/measurements/2026-11-26-cpu-steps.md).
INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

constexpr int kTokens = 2;  // vectors that share a pass over the codes; with four, compilers keep sums in memory

// --- for products of many vectors: words of 32 bits

INLINE W operator&(W a, W b) { return {_mm512_and_si512(a.v, b.v)}; }
INLINE W operator|(W a, W b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int N>
INLINE W shift_right(W a) {
    return {_mm512_srli_epi32(a.v, N)};
}
template <int N>
INLINE W shift_left(W a) {
    return {_mm512_slli_epi32(a.v, N)};
}
INLINE W splat_word(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
INLINE W load_words(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
INLINE void store_words(uint32_t* p, W a) { _mm512_storeu_si512(p, a.v); }
INLINE F to_floats(W a) { return {_mm512_cvtepi32_ps(a.v)}; }

// Return the integers of bytes with codes of mxfp4.
INLINE W float4_codes(W a) {
    const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i*>(kFloat4Codes));
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), a.v)};
}

// Transpose 16 rows of 16 words.
INLINE void transpose(W* rows) {
    __m512i a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i].v, rows[2 * i + 1].v);
        a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i].v, rows[2 * i + 1].v);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) { // b[4 j + i] has words i, i + 4, ... of rows 4 j to 4 j + 3
        const __m512i low = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), high = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
        rows[i] = {_mm512_shuffle_i32x4(low, low2, 0x88)};
        rows[i + 4] = {_mm512_shuffle_i32x4(high, high2, 0x88)};
        rows[i + 8] = {_mm512_shuffle_i32x4(low, low2, 0xdd)};
        rows[i + 12] = {_mm512_shuffle_i32x4(high, high2, 0xdd)};
    }
}

#ifdef FLASHMOE_VNNI
// Add to each lane of `sum` the products of its four bytes, unsigned `codes` and the signed bytes of `x`.
template <bool WIDE>
INLINE W add_products(W sum, W codes, uint32_t x) {
    return {_mm512_dpbusd_epi32(sum.v, codes.v, _mm512_set1_epi32(static_cast<int>(x)))};
}
#else
// The same; WIDE codes exceed 15, and their sums in 16 bits would overflow, so their halves are multiplied apart.
template <bool WIDE>
INLINE W add_products(W sum, W codes, uint32_t x) {
    const __m512i bytes = _mm512_set1_epi32(static_cast<int>(x)), ones = _mm512_set1_epi16(1);
    const __m512i half = _mm512_set1_epi8(15);
    const __m512i low = _mm512_madd_epi16(_mm512_maddubs_epi16(WIDE ? _mm512_and_si512(codes.v, half) : codes.v, bytes),
                                          ones);
    if constexpr (!WIDE) return {_mm512_add_epi32(sum.v, low)};
    const __m512i upper = _mm512_and_si512(_mm512_srli_epi16(codes.v, 4), half);
    const __m512i high = _mm512_madd_epi16(_mm512_maddubs_epi16(upper, bytes), ones);
    return {_mm512_add_epi32(_mm512_add_epi32(sum.v, low), _mm512_slli_epi32(high, 4))};
}
#endif

constexpr int kPanelVectors = 2; // registers of rows in a panel
constexpr int kFloatBlock = 12;  // vectors that share a pass over a panel
constexpr int kByteBlock = 6;
