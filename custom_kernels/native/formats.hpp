// MLX's affine format: a chunk is 16 lanes of codes, a block is 16 groups. The source of each instruction set includes
// this file once, after a `lanes_*.hpp`.
//
// The product with a group can be factored: sum((s q + b) x) = s sum(q x) + b sum(x).

INLINE F any_scales(const uint8_t* p, Scale type) {
    if (type == Scale::bf16) return load_scales<Scale::bf16>(p);
    if (type == Scale::e8m0) return load_scales<Scale::e8m0>(p);
    return type == Scale::f32 ? load_scales<Scale::f32>(p) : load_scales<Scale::f16>(p);
}

INLINE F any_biases(const uint8_t* p, Scale type) {
    const F stored = any_scales(p, type);
    return type == Scale::e8m0 ? stored * splat(kFloat4Bias) : stored;
}

template <int BITS, int J>
INLINE F value(W w) {
    if constexpr (BITS == kFloat4) return float4<J>(w);
    else return decode<BITS, J>(w);
}

template <int BITS>
constexpr int kChunkBytes = BITS == 3 ? 48 : 64;
template <int BITS>
constexpr int kChunk = 16 * codes_per_lane(BITS); // codes in a chunk

template <int BITS, int GROUP>
constexpr int kPerGroup = GROUP / codes_per_lane(BITS); // lanes in a group, and chunks in a block

// Store the sum of every group, and zeros up to the end of the last block.
void add_up_groups(const float* x, int64_t columns, int group, float* sums) {
    const int64_t groups = columns / group, padded = packed_length(columns, group) / group;
    for (int64_t g = 0; g < groups; ++g) {
        F total = load(x + g * group);
        for (int i = kLanes; i < group; i += kLanes) total = total + load(x + g * group + i);
        sums[g] = sum(total);
    }
    for (int64_t g = groups; g < padded; ++g) sums[g] = 0.0f;
}

// A copy of the last, partial block of a row, padded with zeros: codes to a whole chunk, scales to 16.
struct Tail {
    uint8_t codes[32 * 64];
    uint8_t scales[64], biases[64];
    int chunks;
};

template <int BITS, int GROUP>
void read_tail(const uint8_t* codes, const uint8_t* scales, const uint8_t* biases, int groups, int size, Tail& tail) {
    const int bytes = groups * GROUP * width(BITS) / 8;
    tail.chunks = (bytes + kChunkBytes<BITS> - 1) / kChunkBytes<BITS>;
    std::memcpy(tail.codes, codes, bytes);
    std::memset(tail.codes + bytes, 0, tail.chunks * kChunkBytes<BITS> + 16 - bytes);
    std::memset(tail.scales, 0, sizeof tail.scales);
    std::memset(tail.biases, 0, sizeof tail.biases);
    std::memcpy(tail.scales, scales, groups * size);
    std::memcpy(tail.biases, biases, groups * size);
}

// Call function<BITS, GROUP>(m, arguments...).
#define FOR_GROUPS(function, bits_, ...)                                     \
    if (m.group == 32) return function<bits_, 32>(m, __VA_ARGS__);           \
    if (m.group == 64) return function<bits_, 64>(m, __VA_ARGS__);           \
    return function<bits_, 128>(m, __VA_ARGS__);
#define FOR_FORMAT(function, ...)                                            \
    if (m.type == Scale::e8m0) return function<kFloat4, 32>(m, __VA_ARGS__); \
    switch (m.bits) {                                                        \
        case 2: FOR_GROUPS(function, 2, __VA_ARGS__)                         \
        case 3: FOR_GROUPS(function, 3, __VA_ARGS__)                         \
        case 4: FOR_GROUPS(function, 4, __VA_ARGS__)                         \
        default: FOR_GROUPS(function, 8, __VA_ARGS__)                        \
    }

