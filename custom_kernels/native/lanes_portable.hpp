// Sixteen floats in a vector type of the compiler, which maps it to the machine's registers.
#pragma once

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));

struct F {
    Floats v;
};
struct W {
    Words v;
};

inline F splat(float x) { return {Floats{} + x}; }
inline F zero() { return {Floats{}}; }
inline F load(const float* p) {
    F r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
}
inline void store(float* p, F a) { std::memcpy(p, &a.v, sizeof a.v); }
inline F operator+(F a, F b) { return {a.v + b.v}; }
inline F operator-(F a, F b) { return {a.v - b.v}; }
inline F operator*(F a, F b) { return {a.v * b.v}; }
inline F operator/(F a, F b) { return {a.v / b.v}; }
// std::fma would be a function call on machines without the instruction.
inline F fma(F a, F b, F c) { return {a.v * b.v + c.v}; }
inline F larger(F a, F b) { return {a.v > b.v ? a.v : b.v}; }
inline F smaller(F a, F b) { return {a.v < b.v ? a.v : b.v}; }
inline F rounded(F a) { return {(a.v + 12582912.0f) - 12582912.0f}; } // 1.5 * 2^23: for |a| below 2^22
inline F times_power_of_two(F a, F whole) {
    const Integers bits = (__builtin_convertvector(whole.v, Integers) + 127) << 23;
    Floats power;
    std::memcpy(&power, &bits, sizeof power);
    return {a.v * power};
}

inline float sum(F a) {
    float values[16];
    store(values, a);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) values[i] += values[i + width];
    return values[0];
}
inline float largest(F a) {
    float most = a.v[0];
    for (int i = 1; i < 16; ++i) most = a.v[i] > most ? a.v[i] : most;
    return most;
}

inline float from_half(uint16_t half) {
    const uint32_t sign = uint32_t{half & 0x8000u} << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    float value;
    if (exponent == 0) {
        value = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <Scale TYPE>
inline F load_scales(const uint8_t* p) {
    F r;
    if constexpr (TYPE == Scale::f32) {
        std::memcpy(&r.v, p, sizeof r.v);
        return r;
    }
    if constexpr (TYPE == Scale::e8m0) {
        uint32_t powers[16];
        for (int i = 0; i < 16; ++i) powers[i] = p[i] > 1 ? (p[i] - 1u) << 23 : 0;
        std::memcpy(&r.v, powers, sizeof powers);
        return r;
    }
    uint16_t halves[16];
    std::memcpy(halves, p, sizeof halves);
    uint32_t bits[16];
    for (int i = 0; i < 16; ++i) bits[i] = uint32_t{halves[i]} << 16;
    std::memcpy(&r.v, bits, sizeof bits);
    if constexpr (TYPE == Scale::f16)
        for (int i = 0; i < 16; ++i) r.v[i] = from_half(halves[i]);
    return r;
}

// Load sixteen consecutive codes of 8 or 4 bits.
template <int BITS>
inline F sixteen_codes(const uint8_t* p) {
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = BITS == 8 ? p[i] : p[i / 2] >> i % 2 * 4 & 15;
    return load(values);
}

inline F gather(const float* p, int stride) {
    F r;
    for (int i = 0; i < 16; ++i) r.v[i] = p[i * stride];
    return r;
}

template <int BITS>
inline W load_codes(const uint8_t* p) {
    W r;
    if constexpr (BITS != 3) {
        std::memcpy(&r.v, p, sizeof r.v);
    } else {
        uint32_t lanes[16];
        for (int i = 0; i < 16; ++i) lanes[i] = p[3 * i] | p[3 * i + 1] << 8 | p[3 * i + 2] << 16;
        std::memcpy(&r.v, lanes, sizeof lanes);
    }
    return r;
}

template <int BITS, int J>
inline F decode(W w) {
    const Words codes = w.v >> (J * BITS) & ((1u << BITS) - 1);
    Integers whole;
    std::memcpy(&whole, &codes, sizeof whole);
    return {__builtin_convertvector(whole, Floats)};
}

// Return a vector whose lane i is element kGroupOfLane<PER_GROUP>.of[16 * chunk + i] of `block`.
template <int PER_GROUP>
inline F spread(F block, int chunk) {
    float values[16], lanes[16];
    store(values, block);
    for (int i = 0; i < 16; ++i) lanes[i] = values[(16 * chunk + i) / PER_GROUP];
    return load(lanes);
}

inline void prefetch(const uint8_t* p) { __builtin_prefetch(p); }

constexpr int kTokens = 1;  // vectors that share a pass over the codes

// --- for products of many vectors: words of 32 bits

inline W operator&(W a, W b) { return {a.v & b.v}; }
inline W operator|(W a, W b) { return {a.v | b.v}; }
template <int N>
inline W shift_right(W a) {
    return {a.v >> N};
}
template <int N>
inline W shift_left(W a) {
    return {a.v << N};
}
inline W splat_word(uint32_t x) { return {Words{} + x}; }
inline W load_words(const uint32_t* p) {
    W r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
}
inline void store_words(uint32_t* p, W a) { std::memcpy(p, &a.v, sizeof a.v); }
inline F to_floats(W a) {
    Integers whole;
    std::memcpy(&whole, &a.v, sizeof whole);
    return {__builtin_convertvector(whole, Floats)};
}

// Return the integers of bytes with codes of mxfp4.
inline W float4_codes(W a) {
    uint8_t bytes[64];
    std::memcpy(bytes, &a.v, sizeof bytes);
    for (uint8_t& byte : bytes) byte = kFloat4Codes[byte & 15];
    std::memcpy(&a.v, bytes, sizeof bytes);
    return a;
}

// Return code J of each lane in mxfp4, as its integer.
template <int J>
inline F float4(W w) {
    return to_floats(float4_codes(shift_right<J * 4>(w)) & splat_word(255));
}

// Transpose 16 rows of 16 words.
inline void transpose(W* rows) {
    uint32_t words[16][16], own[16];
    for (int i = 0; i < 16; ++i) store_words(words[i], rows[i]);
    for (int i = 0; i < 16; ++i) {
        for (int row = 0; row < 16; ++row) own[row] = words[row][i];
        rows[i] = load_words(own);
    }
}

// Add to each lane of `sum` the products of its four bytes, unsigned `codes` and the signed bytes of `x`.
template <bool WIDE>
inline W add_products(W sum, W codes, uint32_t x) {
    for (int i = 0; i < 4; ++i) sum.v += (codes.v >> (8 * i) & 255u) * static_cast<uint32_t>(static_cast<int8_t>(x >> (8 * i)));
    return sum;
}

constexpr int kPanelVectors = 1; // vectors of rows in a panel
constexpr int kFloatBlock = 2;   // vectors that share a pass over a panel
constexpr int kByteBlock = 2;
