// Products of a few vectors as integers of 24 bits. In each group x = scale * (65536 high + 256 middle + low), with
// three signed bytes. x is rounded to 2^-24 of the largest value of its group, about the precision of a float. VNNI
// multiplies the bytes by unsigned codes and adds four products per lane in 32 bits, exactly.
//
// For AVX-512 with VNNI and VBMI; included after `lanes_avx512.hpp` and `formats.hpp` and before `dot.hpp`.

constexpr float kMost = 8355000.0f; // the largest integer: less than 127.5 * 65536, where `high` would overflow
constexpr float kLeast = 1e-30f;    // smaller groups count as zero, because 1 / scale would overflow

// The number of parts of a chunk; a part has four bytes of each lane, which are multiplied at once.
template <int BITS>
constexpr int kParts = codes_per_lane(BITS) / 4;

struct Vector {
    const uint8_t* planes; // for each chunk [high, middle, low][part][64]
    const float *scales, *sums;

    Vector() = default;
    Vector(const uint8_t* from, int64_t columns, int group)
        : planes(from), scales(reinterpret_cast<const float*>(from + 3 * packed_length(columns, group))),
          sums(scales + packed_sums(columns, group)) {}
};

int64_t vector_bytes(int64_t columns, int group) {
    return 3 * packed_length(columns, group) + 8 * packed_sums(columns, group);
}

// The order of codes in parts: byte k of part p is code 4 k + p of 2 bits, 2 k + p of 4 bits, else 4 p + k. The shuffle
// takes 16 bytes of one or more lanes from the order of codes to the order of parts.
template <int BITS>
INLINE __m512i by_part(__m512i bytes) {
    if constexpr (BITS == 2)
        return _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14,
                                                                               3, 7, 11, 15)));
    if constexpr (BITS == 4)
        return _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14,
                                                                               9, 11, 13, 15)));
    return bytes;
}

// The source of each byte of a lane among codes of 3 bits; the codes of a lane take three bytes.
struct ThreeBytes {
    uint8_t of[64];
    constexpr ThreeBytes() : of() {
        for (int i = 0; i < 64; ++i) of[i] = static_cast<uint8_t>(i / 4 * 3 + (i % 4 < 3 ? i % 4 : 2));
    }
};
inline constexpr ThreeBytes kThreeBytes{};

template <int BITS>
INLINE void split(const uint8_t* p, __m512i* part) {
    if constexpr (BITS == 3) {
        // Three bytes per lane; then, for each pair of lanes, the eight bits that begin at each code.
        const __m512i lanes = _mm512_permutexvar_epi8(_mm512_loadu_si512(kThreeBytes.of),
                                                      _mm512_maskz_loadu_epi8((uint64_t{1} << 48) - 1, p));
        const __m512i seven = _mm512_set1_epi8(7);
        part[0] = _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2926232009060300), lanes), seven);
        part[1] = _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x35322f2c15120f0c), lanes), seven);
    } else {
        __m512i bytes = _mm512_loadu_si512(p);
        asm("" : "+v"(bytes)); // one load
        const __m512i mask = _mm512_set1_epi8((1 << width(BITS)) - 1);
        part[0] = BITS == 8 ? bytes : _mm512_and_si512(bytes, mask);
#pragma GCC unroll 4 // keeps parts in registers
        for (int i = 1; i < kParts<BITS>; ++i) part[i] = _mm512_and_si512(_mm512_srli_epi16(bytes, width(BITS) * i), mask);
        if constexpr (BITS == kFloat4)
#pragma GCC unroll 4
            for (int i = 0; i < kParts<BITS>; ++i) part[i] = float4_codes({part[i]}).v;
    }
}

template <int BITS>
void prepare_typed(const float* x, int64_t columns, int group, uint8_t* to) {
    constexpr int parts = kParts<BITS>, chunk = kChunk<BITS>;
    const int64_t length = packed_length(columns, group);
    float* scales = reinterpret_cast<float*>(to + 3 * length);
    const __m512i offset = _mm512_set1_epi32(0x8080), stride = _mm512_setr_epi32(
        0, parts, 2 * parts, 3 * parts, 4 * parts, 5 * parts, 6 * parts, 7 * parts, 8 * parts, 9 * parts, 10 * parts,
        11 * parts, 12 * parts, 13 * parts, 14 * parts, 15 * parts);
    alignas(64) uint8_t planes[3][chunk];
    __m512 inverse = _mm512_setzero_ps();
    for (int64_t first = 0; first < length; first += chunk) {
        for (int i = 0; i < chunk; i += kLanes) {
            const int64_t at = first + i;
            if (at % group == 0) {
                __m512i most = _mm512_setzero_si512(); // bits of floats; NaN has the largest
                for (int64_t k = at; k < at + group && at < columns; k += kLanes)
                    most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_loadu_si512(x + k),
                                                                   _mm512_set1_epi32(0x7fffffff)));
                const int32_t bits = static_cast<int32_t>(_mm512_reduce_max_epu32(most));
                float largest;
                std::memcpy(&largest, &bits, 4);
                const bool zero = largest < kLeast;
                scales[at / group] = zero ? 0.0f : std::isfinite(largest) ? largest / kMost : NAN;
                inverse = _mm512_set1_ps(zero ? 0.0f : kMost / largest);
            }
            const __m512 values = at < columns ? _mm512_loadu_ps(x + at) : _mm512_setzero_ps();
            // Adding 0x80 makes both lower bytes unsigned; flipping their highest bits subtracts it again.
            const __m512i whole = _mm512_xor_si512(
                _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(values, inverse)), offset), offset);
            for (int plane = 0; plane < 3; ++plane)
                _mm_store_si128(reinterpret_cast<__m128i*>(planes[plane] + i),
                                _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 16 - 8 * plane)));
        }
        for (int plane = 0; plane < 3; ++plane) {
            for (int part = 0; part < parts; ++part) {
                uint8_t* own = planes[plane] + 64 * part;
                _mm512_store_si512(own, by_part<BITS>(_mm512_load_si512(own)));
            }
            for (int part = 0; part < parts; ++part)
                _mm512_store_si512(to + 3 * first + (plane * parts + part) * 64,
                                   _mm512_i32gather_epi32(stride, planes[plane] + 4 * part, 4));
        }
    }
    add_up_groups(x, columns, group, scales + packed_sums(columns, group));
}

void prepare(const float* x, int64_t columns, int bits, int group, uint8_t* to) {
    switch (bits) {
        case 2: return prepare_typed<2>(x, columns, group, to);
        case 3: return prepare_typed<3>(x, columns, group, to);
        case 4: return prepare_typed<4>(x, columns, group, to);
        default: return prepare_typed<8>(x, columns, group, to);
    }
}

// The number of rows that share a pass over a vector; the result of a row does not depend on it.
constexpr int kRowsAtOnce = 2;

// Return zeros in a register that compilers do not copy from another one: a copy of 64 bytes takes an execution unit.
INLINE __m512i fresh_zero() {
    __m512i zeros;
    asm volatile("vpxord %0, %0, %0" : "=v"(zeros));
    return zeros;
}

// Load 64 bytes into a register, once for all of its uses.
INLINE __m512i load_once(const uint8_t* p) {
    __m512i bytes = _mm512_load_si512(p);
    asm("" : "+v"(bytes));
    return bytes;
}

// Add codes of a chunk times a vector to `total`, for all rows.
template <int BITS, int ROWS>
INLINE void multiply_parts(const __m512i (*part)[kParts<BITS>], const uint8_t* planes, __m512i* upper, __m512i* lower) {
    constexpr int parts = kParts<BITS>;
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) upper[r] = fresh_zero();
    const auto add = [&](__m512i* sum, int plane) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int i = 0; i < parts; ++i) {
            const __m512i bytes = load_once(planes + (plane * parts + i) * 64);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) sum[r] = _mm512_dpbusd_epi32(sum[r], part[r][i], bytes);
        }
    };
    // Less than 2^31, because 24 * 128 * 8 * 65793 is.
    add(upper, 0);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) upper[r] = _mm512_slli_epi32(upper[r], 8);
    add(upper, 1);
    if constexpr (BITS < 8) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) upper[r] = _mm512_slli_epi32(upper[r], 8);
        add(upper, 2);
    } else {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) lower[r] = fresh_zero();
        add(lower, 2);
    }
}

// Add the first `chunks` chunks of block `b`.
template <int BITS, int GROUP, int ROWS, int TOKENS>
INLINE void add_block(const uint8_t* const* codes, const F* scales, const Vector* x, int64_t b, int chunks,
                      F (*total)[TOKENS]) {
    constexpr int parts = kParts<BITS>;
    F own[ROWS][TOKENS];
    for (int t = 0; t < TOKENS; ++t) {
        const F vector_scales = load(x[t].scales + 16 * b);
        for (int r = 0; r < ROWS; ++r) own[r][t] = scales[r] * vector_scales;
    }
    for (int c = 0; c < chunks; ++c) {
        __m512i part[ROWS][parts];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            split<BITS>(codes[r] + c * kChunkBytes<BITS>, part[r]);
            prefetch(codes[r] + c * kChunkBytes<BITS> + kAhead);
        }
        const int64_t at = 3 * (b * 16 * GROUP + c * kChunk<BITS>);
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t) {
            __m512i upper[ROWS], lower[ROWS];
            multiply_parts<BITS, ROWS>(part, x[t].planes + at, upper, lower);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                F product{_mm512_cvtepi32_ps(upper[r])};
                if constexpr (BITS == 8) product = fma(product, splat(256.0f), {_mm512_cvtepi32_ps(lower[r])});
                total[r][t] = fma(product, spread<kPerGroup<BITS, GROUP>>(own[r][t], c), total[r][t]);
            }
        }
    }
}
