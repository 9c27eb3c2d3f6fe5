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
    const uint16x4_t half = vreinterpret_u16_u8(vld1_u8(p + 8 * number));
    if constexpr (TYPE == Scale::f16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

template <Scale TYPE>
INLINE F load_scales(const uint8_t* p) {
    return {load_four_scales<TYPE>(p, 0), load_four_scales<TYPE>(p, 1), load_four_scales<TYPE>(p, 2),
            load_four_scales<TYPE>(p, 3)};
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
constexpr int kVectors = 1;
constexpr int kRows = 4;
