// What every instruction set offers: the operations on a range of rows, heads or tokens that one thread works through.
#pragma once

#include <cstddef>
#include <cstdint>

// Registers are passed about as structures: without this, compilers put them into memory.
#define INLINE inline __attribute__((always_inline))

namespace flashmoe {

constexpr int kLanes = 16;     // floats that the bodies handle at once, whatever the width of the registers
constexpr int kMostTokens = 4; // vectors that share one pass over the codes
constexpr int kTile = 64;      // vectors that share one dequantised block
constexpr int kSlack = 8;
constexpr int kScratch = 8 * 16 * 128;
constexpr int kAhead = 8192;   // bytes: how far ahead codes are prefetched

enum class Scale : int { f32 = 0, bf16 = 1, f16 = 2 };

// A matrix [rows, columns] in MLX's affine format. Nothing is aligned.
struct Matrix {
    const uint8_t* codes;
    const uint8_t* scales;
    const uint8_t* biases;
    int64_t rows;
    int64_t columns;
    int bits;
    int group;
    Scale type;

    int64_t scale_bytes() const { return type == Scale::f32 ? 4 : 2; }
    int64_t groups() const { return columns / group; }
    int64_t row_bytes() const { return columns * bits / 8; }
    int64_t scale_row_bytes() const { return groups() * scale_bytes(); }
};

// Codes of one 32-bit lane; 3-bit codes are spread, eight of them in 24 bits.
constexpr int codes_per_lane(int bits) { return bits == 2 ? 16 : bits == 8 ? 4 : 8; }

// Which of a block's 16 groups each lane of each chunk belongs to.
template <int PER_GROUP>
struct GroupOfLane {
    int32_t of[16 * PER_GROUP];
    constexpr GroupOfLane() : of() {
        for (int lane = 0; lane < 16 * PER_GROUP; ++lane) of[lane] = lane / PER_GROUP;
    }
};
template <int PER_GROUP>
inline constexpr GroupOfLane<PER_GROUP> kGroupOfLane{};

// Where column `column` is in a packed vector.
inline int64_t packed_place(int64_t column, int bits) {
    const int64_t per_lane = codes_per_lane(bits), chunk = kLanes * per_lane, within = column % chunk;
    return column - within + kLanes * (within % per_lane) + within / per_lane;
}

// A packed vector: blocks of 16 groups, zero at the end; in a chunk of 16 lanes, element [j][i] is that of
// code j of lane i.
inline int64_t packed_length(int64_t columns, int group) {
    int64_t block = int64_t{kLanes} * group;
    return (columns + block - 1) / block * block;
}

inline int64_t packed_sums(int64_t columns, int group) { return packed_length(columns, group) / group; }

struct DeltaShape {
    int64_t key_heads, value_heads, key_dim, value_dim, taps;
    int64_t key_width() const { return key_heads * key_dim; }
    int64_t value_width() const { return value_heads * value_dim; }
    int64_t channels() const { return 2 * key_width() + value_width(); }
};

struct AttentionShape {
    int64_t heads, kv_heads, head_dim, rotary_dim, capacity, start;
};

struct Operations {
    const char* name;

    // `x` [columns] as `multiply` wants it: in the order of `bits`.
    void (*pack)(const float* x, int64_t columns, int bits, int group, float* packed);

    // `x` [columns] as `dot` wants it, and the bytes that it takes, whole cache lines.
    int64_t (*vector_bytes)(int64_t columns, int group);
    void (*prepare)(const float* x, int64_t columns, int bits, int group, uint8_t* to);

    // out[t][row - begin] = row of `m` times vector t, for up to kMostTokens prepared vectors.
    void (*dot)(const Matrix& m, int64_t begin, int64_t end, int tokens, const uint8_t* const* vectors,
                float* const* out);

    // tile[row - begin][t] for up to kTile vectors; `across` [packed_length][width] holds the packed vectors side by
    // side, `width` a multiple of 16. `tile` has room for kSlack more rows; `scratch`: kScratch floats.
    void (*multiply)(const Matrix& m, int64_t begin, int64_t end, const float* across, int width, float* tile,
                     float* scratch);

    // gate = silu(gate) * up.
    void (*swiglu)(float* gate, const float* up, int64_t count);

    // Channels [begin, end) of silu(convolution) of `tokens` tokens. `padded` row r is past[r] or qkv[r - (taps - 1)].
    void (*convolve)(const float* past, const float* qkv, const float* weights, int64_t tokens, int64_t channels,
                     int64_t taps, int64_t begin, int64_t end, float* mixed);

    // One value head through all tokens. `scratch`: 2 * key_dim + value_dim floats.
    void (*delta)(const DeltaShape& shape, int64_t head, int64_t tokens, const float* mixed, const float* z,
                  const float* b, const float* a, const float* a_log, const float* dt_bias, const float* norm,
                  float eps, float* state, float* y, float* scratch);

    // out = x / rms(x) * weight, for one row of `count`; `weight` null: 1.
    void (*rms_norm)(const float* x, const float* weight, int64_t count, float eps, float* out);

    // `heads` queries [heads][dim] against keys [begin, end) of one kv head: unnormalised sums [heads][dim], and the
    // largest score and the sum of weights of each head, [heads][2]. `scratch`: heads * 64 floats.
    void (*attend)(const float* queries, int64_t heads, int64_t dim, const float* keys, const float* values,
                   int64_t begin, int64_t end, float* sums, float* peaks, float* scratch);

    // x[i] *= sigmoid(gate[i]).
    void (*gate)(float* x, const float* gate, int64_t count);
};

// Null where this machine, or this build, lacks it.
const Operations* portable_operations();
const Operations* avx2_operations();
const Operations* avx512_operations();
const Operations* avx512_vnni_operations();
const Operations* neon_operations();

} // namespace flashmoe
