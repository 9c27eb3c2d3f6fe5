// The interface of every instruction set: operations on a range of rows, heads or tokens, for one thread.
#pragma once

#include <cstddef>
#include <cstdint>

// Functions pass registers in structures; without this attribute, compilers put them into memory.
#define INLINE inline __attribute__((always_inline))

namespace flashmoe {

constexpr int kLanes = 16;     // floats in a vector, whatever the width of the registers
// The most vectors for which a product reads the codes directly; for more, panels are unpacked. Python checks both.
constexpr int64_t kFewTokens = 8;
constexpr int kMostTokens = 4; // vectors that share one pass over the codes
constexpr int kTile = 64;      // tokens that pass through GatedDeltaNet or attention together
constexpr int kAhead = 8192;   // bytes between codes in use and prefetched codes

enum class Scale : int { f32 = 0, bf16 = 1, f16 = 2, e8m0 = 3 };

// Codes of mxfp4, in place of a width. Twice its values plus 12 are the integers below; with half of the scale, and -12
// times that half as the bias, they are codes of the affine format.
constexpr int kFloat4 = 5;
alignas(16) inline constexpr uint8_t kFloat4Codes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
constexpr float kFloat4Bias = -12.0f;

// Return the bits of a code.
constexpr int width(int bits) { return bits == kFloat4 ? 4 : bits; }

// A matrix [rows, columns] in MLX's affine format, or, where scales are e8m0, in mxfp4, without any alignment. In mxfp4
// the biases follow from the scales, and `biases` points to the scales.
struct Matrix {
    const uint8_t* codes;
    const uint8_t* scales;
    const uint8_t* biases;
    int64_t rows;
    int64_t columns;
    int bits;
    int group;
    Scale type;

    int64_t scale_bytes() const { return type == Scale::f32 ? 4 : type == Scale::e8m0 ? 1 : 2; }
    int64_t groups() const { return columns / group; }
    int64_t row_bytes() const { return columns * bits / 8; }
    int64_t scale_row_bytes() const { return groups() * scale_bytes(); }
};

// Return the number of codes in a 32-bit lane; eight 3-bit codes take 24 of the bits.
constexpr int codes_per_lane(int bits) { return bits == 2 ? 16 : bits == 8 ? 4 : 8; }

// The group of each lane of each chunk, among the 16 groups of a block.
template <int PER_GROUP>
struct GroupOfLane {
    int32_t of[16 * PER_GROUP];
    constexpr GroupOfLane() : of() {
        for (int lane = 0; lane < 16 * PER_GROUP; ++lane) of[lane] = lane / PER_GROUP;
    }
};
template <int PER_GROUP>
inline constexpr GroupOfLane<PER_GROUP> kGroupOfLane{};

// Return the length of a packed vector: blocks of 16 groups, zero at the end; in a chunk of 16 lanes, element [j][i]
// belongs to code j of lane i.
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
    int64_t heads, kv_heads, head_dim, rotary_dim;
};

// The rows of a KV cache: f32, bf16, or codes of 8 or 4 bits followed by a scale and a bias in bf16 for each group.
struct RowFormat {
    int bits, group;
    int64_t dim;
    int64_t code_bytes() const { return dim * bits / 8; }
    int64_t row_bytes() const { return code_bytes() + (bits < 16 ? dim / group * 4 : 0); }
};

// Parts of nearly equal size of `count` items, each of at most `most`.
struct Parts {
    int64_t count, parts;

    Parts(int64_t count_, int64_t most) : count(count_), parts((count_ + most - 1) / most) {}
    int64_t begin(int64_t part) const { return count * part / parts; }
    int64_t size(int64_t part) const { return begin(part + 1) - begin(part); }
};

// Products of many vectors, which are arranged first, in `Parts(vectors, block)`; see `matmul.hpp`.
struct Multiplication {
    int64_t block; // vectors side by side
    int64_t rows;  // of a panel
    int64_t few;   // the most vectors for which `dot` takes less time

    // Return the size of an arranged vector in bytes, a multiple of 4.
    int64_t (*vector_bytes)(int64_t columns, int group);

    // Store `count` <= `block` vectors for matrices of a format.
    void (*arrange)(const float* const* x, int count, int64_t columns, int bits, int group, uint8_t* to);

    // Return the floats of scratch memory that `multiply` needs.
    int64_t (*scratch)(const Matrix& m);

    // Compute tile[t][r] = row `first + r` of `m` times vector t, r < rows; rows beyond the end of `m` are undefined.
    void (*multiply)(const Matrix& m, int64_t first, int64_t vectors, const uint8_t* arranged, float* tile,
                     float* scratch);
};

struct Operations {
    const char* name;

    // Prepare `x` [columns] for `dot`, and return the size of a prepared vector in bytes, in whole cache lines.
    int64_t (*vector_bytes)(int64_t columns, int group);
    void (*prepare)(const float* x, int64_t columns, int bits, int group, uint8_t* to);

    // Compute out[t][row - begin] = row of `m` times vector t, for up to kMostTokens prepared vectors.
    void (*dot)(const Matrix& m, int64_t begin, int64_t end, int tokens, const uint8_t* const* vectors,
                float* const* out);

    Multiplication floats, bytes;
    Multiplication rounded; // products of floats that are rounded to bf16 first

    // Compute gate = silu(gate) * up.
    void (*swiglu)(float* gate, const float* up, int64_t count);

    // Compute channels [begin, end) of silu(convolution) for `tokens` tokens after `conv_state` [taps - 1, channels].
    void (*convolve)(const float* conv_state, const float* qkv, const float* weights, int64_t tokens, int64_t channels,
                     int64_t taps, int64_t begin, int64_t end, float* mixed);

    // Run the recurrence of one value head over all tokens. `scratch` has 2 * key_dim + value_dim floats.
    void (*delta)(const DeltaShape& shape, int64_t head, int64_t tokens, const float* mixed, const float* z,
                  const float* b, const float* a, const float* a_log, const float* dt_bias, const float* norm,
                  float eps, float* recurrent_state, float* y, float* scratch);

    // Compute out = x / rms(x) * weight for one row of `count`; a null `weight` stands for 1.
    void (*rms_norm)(const float* x, const float* weight, int64_t count, float eps, float* out);

    // Store `x` [dim] as a row of a KV cache.
    void (*store_row)(const float* x, const RowFormat& rows, uint8_t* to);

    // Attend from queries [heads][dim] to keys [begin, end) of one kv head: store unnormalized sums [heads][dim], and
    // the largest score and the sum of weights of each head, [heads][2]. `scratch` has (heads + dim) * 64 floats.
    void (*attend)(const float* queries, int64_t heads, const RowFormat& rows, const uint8_t* keys,
                   const uint8_t* values, int64_t begin, int64_t end, float* sums, float* peaks, float* scratch);

    // Attend from queries [tokens][heads][dim] of one kv head, whose tokens are `stride` floats apart like those of the
    // results `y`. The first token sees `seen` keys, each further token one more. `attend_block` returns the number of
    // tokens in the best call, and `attend_scratch` the floats of scratch memory for it.
    int64_t (*attend_block)(int64_t heads);
    int64_t (*attend_scratch)(int64_t heads, int64_t dim);
    void (*attend_many)(const float* queries, int64_t stride, int64_t tokens, int64_t heads, const RowFormat& rows,
                        const uint8_t* keys, const uint8_t* values, int64_t seen, float* y, float* scratch);

    // Compute x[i] *= sigmoid(gate[i]).
    void (*gate)(float* x, const float* gate, int64_t count);
};

// Return the operations of an instruction set; null if this machine or this build lacks it.
const Operations* portable_operations();
const Operations* avx2_operations();
const Operations* avx512_operations();
const Operations* avx512_vnni_operations();
const Operations* neon_operations();

// Return products with vectors in bf16; null if this machine or this build lacks instructions for them.
const Multiplication* avx512_bf16();

} // namespace flashmoe
