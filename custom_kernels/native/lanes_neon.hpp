// Sixteen floats in four registers.
#pragma once

struct F {
    float32x4_t v0, v1, v2, v3;
};
struct W {
    uint32x4_t v0, v1, v2, v3;
};

INLINE F splat(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}; }
INLINE F zero() { return splat(0); }
INLINE F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
INLINE void store(float* p, F a) {
    vst1q_f32(p, a.v0);
    vst1q_f32(p + 4, a.v1);
    vst1q_f32(p + 8, a.v2);
    vst1q_f32(p + 12, a.v3);
}

#define OF_TWO(name, instruction) \
    INLINE F name(F a, F b) {     \
        return {instruction(a.v0, b.v0), instruction(a.v1, b.v1), instruction(a.v2, b.v2), instruction(a.v3, b.v3)}; \
    }
OF_TWO(operator+, vaddq_f32)
OF_TWO(operator-, vsubq_f32)
OF_TWO(operator*, vmulq_f32)
OF_TWO(operator/, vdivq_f32)
OF_TWO(larger, vmaxq_f32)
OF_TWO(smaller, vminq_f32)
#undef OF_TWO

INLINE F fma(F a, F b, F c) {
    return {vfmaq_f32(c.v0, a.v0, b.v0), vfmaq_f32(c.v1, a.v1, b.v1), vfmaq_f32(c.v2, a.v2, b.v2),
            vfmaq_f32(c.v3, a.v3, b.v3)};
}
INLINE F rounded(F a) { return {vrndnq_f32(a.v0), vrndnq_f32(a.v1), vrndnq_f32(a.v2), vrndnq_f32(a.v3)}; }
INLINE float32x4_t power_of_two(float32x4_t whole) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(whole), vdupq_n_s32(127)), 23));
}
INLINE F times_power_of_two(F a, F whole) {
    return a * F{power_of_two(whole.v0), power_of_two(whole.v1), power_of_two(whole.v2), power_of_two(whole.v3)};
}

INLINE float sum(F a) {
    // In the same order as the other instruction sets: halves, quarters, pairs.
    float32x4_t c = vaddq_f32(vaddq_f32(a.v0, a.v2), vaddq_f32(a.v1, a.v3));
    float32x2_t d = vadd_f32(vget_low_f32(c), vget_high_f32(c));
    return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
}
INLINE float largest(F a) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v0, a.v1), vmaxq_f32(a.v2, a.v3))); }

template <Scale TYPE>
INLINE float32x4_t load_four_scales(const uint8_t* p, int number) {
    if constexpr (TYPE == Scale::f32) return vreinterpretq_f32_u8(vld1q_u8(p + 16 * number));
    if constexpr (TYPE == Scale::e8m0) {
        uint32_t four;
        std::memcpy(&four, p + 4 * number, 4);
        const uint8x8_t half = vqsub_u8(vreinterpret_u8_u32(vdup_n_u32(four)), vdup_n_u8(1));
        return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vget_low_u16(vmovl_u8(half))), 23));
    }
    const uint16x4_t half = vreinterpret_u16_u8(vld1_u8(p + 8 * number));
    if constexpr (TYPE == Scale::f16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

template <Scale TYPE>
INLINE F load_scales(const uint8_t* p) {
    return {load_four_scales<TYPE>(p, 0), load_four_scales<TYPE>(p, 1), load_four_scales<TYPE>(p, 2),
            load_four_scales<TYPE>(p, 3)};
}

// Load sixteen consecutive codes of 8 or 4 bits.
template <int BITS>
INLINE F sixteen_codes(const uint8_t* p) {
    uint8x16_t bytes;
    if constexpr (BITS == 8) {
        bytes = vld1q_u8(p);
    } else {
        const uint8x8_t pairs = vld1_u8(p);
        const uint8x8x2_t both = vzip_u8(vand_u8(pairs, vdup_n_u8(15)), vshr_n_u8(pairs, 4));
        bytes = vcombine_u8(both.val[0], both.val[1]);
    }
    const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
    return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(low))),
            vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(high)))};
}

INLINE F gather(const float* p, int stride) {
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = p[i * stride];
    return load(values);
}

template <int BITS>
INLINE uint32x4_t load_four_lanes(const uint8_t* p, int number) {
    if constexpr (BITS != 3) return vreinterpretq_u32_u8(vld1q_u8(p + 16 * number));
    const uint8_t* q = p + 12 * number;
    uint32_t last;
    std::memcpy(&last, q + 8, 4);
    const uint8x16_t bytes = vcombine_u8(vld1_u8(q), vreinterpret_u8_u32(vdup_n_u32(last)));
    static const uint8_t order[16] = {0, 1, 2, 255, 3, 4, 5, 255, 6, 7, 8, 255, 9, 10, 11, 255};
    return vreinterpretq_u32_u8(vqtbl1q_u8(bytes, vld1q_u8(order)));
}

template <int BITS>
INLINE W load_codes(const uint8_t* p) {
    return {load_four_lanes<BITS>(p, 0), load_four_lanes<BITS>(p, 1), load_four_lanes<BITS>(p, 2),
            load_four_lanes<BITS>(p, 3)};
}

template <int BITS, int J>
INLINE float32x4_t decode_four(uint32x4_t w) {
    if constexpr (J > 0) w = vshrq_n_u32(w, J * BITS);
    return vcvtq_f32_u32(vandq_u32(w, vdupq_n_u32((1u << BITS) - 1)));
}

template <int BITS, int J>
INLINE F decode(W w) {
    return {decode_four<BITS, J>(w.v0), decode_four<BITS, J>(w.v1), decode_four<BITS, J>(w.v2),
            decode_four<BITS, J>(w.v3)};
}

// Return a vector whose lane i is element kGroupOfLane<PER_GROUP>.of[16 * chunk + i] of `block`.
template <int PER_GROUP>
INLINE F spread(F block, int chunk) {
    float values[16], lanes[16];
    store(values, block);
    for (int i = 0; i < 16; ++i) lanes[i] = values[(16 * chunk + i) / PER_GROUP];
    return load(lanes);
}

INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p); }

constexpr int kTokens = 4;  // vectors that share a pass over the codes

// --- for products of many vectors: words of 32 bits

#define OF_WORDS(name, instruction) \
    INLINE W name(W a, W b) {       \
        return {instruction(a.v0, b.v0), instruction(a.v1, b.v1), instruction(a.v2, b.v2), instruction(a.v3, b.v3)}; \
    }
OF_WORDS(operator&, vandq_u32)
OF_WORDS(operator|, vorrq_u32)
#undef OF_WORDS
template <int N>
INLINE W shift_right(W a) {
    if constexpr (N == 0) return a;
    else return {vshrq_n_u32(a.v0, N), vshrq_n_u32(a.v1, N), vshrq_n_u32(a.v2, N), vshrq_n_u32(a.v3, N)};
}
template <int N>
INLINE W shift_left(W a) {
    return {vshlq_n_u32(a.v0, N), vshlq_n_u32(a.v1, N), vshlq_n_u32(a.v2, N), vshlq_n_u32(a.v3, N)};
}
INLINE W splat_word(uint32_t x) { return {vdupq_n_u32(x), vdupq_n_u32(x), vdupq_n_u32(x), vdupq_n_u32(x)}; }
INLINE W load_words(const uint32_t* p) { return {vld1q_u32(p), vld1q_u32(p + 4), vld1q_u32(p + 8), vld1q_u32(p + 12)}; }
INLINE void store_words(uint32_t* p, W a) {
    vst1q_u32(p, a.v0);
    vst1q_u32(p + 4, a.v1);
    vst1q_u32(p + 8, a.v2);
    vst1q_u32(p + 12, a.v3);
}
INLINE float32x4_t to_four_floats(uint32x4_t a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
INLINE F to_floats(W a) {
    return {to_four_floats(a.v0), to_four_floats(a.v1), to_four_floats(a.v2), to_four_floats(a.v3)};
}

// Return the integers of bytes with codes of mxfp4; bytes above 15 become 0.
INLINE uint32x4_t float4_codes_of(uint32x4_t a) {
    return vreinterpretq_u32_u8(vqtbl1q_u8(vld1q_u8(kFloat4Codes), vreinterpretq_u8_u32(a)));
}
INLINE W float4_codes(W a) {
    return {float4_codes_of(a.v0), float4_codes_of(a.v1), float4_codes_of(a.v2), float4_codes_of(a.v3)};
}

// Return code J of each lane in mxfp4, as its integer.
template <int J>
INLINE F float4(W w) {
    return to_floats(float4_codes((shift_right<J * 4>(w) & splat_word(15)) | splat_word(0xffffff00)));
}

// Transpose 16 rows of 16 words.
INLINE void transpose(W* rows) {
    uint32_t words[16][16];
    for (int i = 0; i < 16; ++i) store_words(words[i], rows[i]);
    for (int i = 0; i < 16; i += 4) { // vld4 takes columns i to i + 3 apart, if their rows lie side by side
        uint32_t part[4][16];
        for (int row = 0; row < 16; ++row) vst1q_u32(part[row / 4] + row % 4 * 4, vld1q_u32(words[row] + i));
        const uint32x4x4_t a = vld4q_u32(part[0]), b = vld4q_u32(part[1]), c = vld4q_u32(part[2]), d = vld4q_u32(part[3]);
        for (int j = 0; j < 4; ++j) rows[i + j] = {a.val[j], b.val[j], c.val[j], d.val[j]};
    }
}

INLINE int32x4_t add_products(int32x4_t sum, int8x16_t codes, int8x16_t bytes) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, codes, bytes);
#else
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(codes), vget_low_s8(bytes)));
    const int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8(codes), vget_high_s8(bytes)));
    return vaddq_s32(sum, vpaddq_s32(low, high));
#endif
}

template <bool WIDE>
INLINE uint32x4_t add_products(uint32x4_t sum, uint32x4_t codes, int8x16_t bytes) {
    const int32x4_t before = vreinterpretq_s32_u32(sum);
    const uint8x16_t own = vreinterpretq_u8_u32(codes);
    if constexpr (!WIDE) return vreinterpretq_u32_s32(add_products(before, vreinterpretq_s8_u8(own), bytes));
    const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(own, vdupq_n_u8(15)));
    const int32x4_t high = add_products(vdupq_n_s32(0), vreinterpretq_s8_u8(vshrq_n_u8(own, 4)), bytes);
    return vreinterpretq_u32_s32(vaddq_s32(add_products(before, low, bytes), vshlq_n_s32(high, 4)));
}

// Add to each lane of `sum` the products of its four bytes, unsigned `codes` and the signed bytes of `x`. WIDE codes
// exceed 127 and are no signed bytes, so their halves are multiplied apart.
template <bool WIDE>
INLINE W add_products(W sum, W codes, uint32_t x) {
    const int8x16_t bytes = vreinterpretq_s8_u32(vdupq_n_u32(x));
    return {add_products<WIDE>(sum.v0, codes.v0, bytes), add_products<WIDE>(sum.v1, codes.v1, bytes),
            add_products<WIDE>(sum.v2, codes.v2, bytes), add_products<WIDE>(sum.v3, codes.v3, bytes)};
}

constexpr int kPanelVectors = 1; // vectors of rows in a panel
constexpr int kFloatBlock = 6;   // vectors that share a pass over a panel
constexpr int kByteBlock = 4;
