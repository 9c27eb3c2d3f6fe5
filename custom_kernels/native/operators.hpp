// The operations on whole arrays, shared among threads.
#pragma once

#include <vector>

#include "operations.hpp"

namespace flashmoe {

// Vectors up to which a product passes over the codes; for more, blocks are dequantised. Python checks both.
constexpr int64_t kFewTokens = 8;

// The best that this machine can run, or what `choose_operations` named.
const Operations& operations();

// False if there is no such instruction set here; "auto" is the best.
bool choose_operations(const char* name);

// y [tokens, rows] = x [tokens, columns] times the transpose of `matrix`.
struct Product {
    Matrix matrix;
    float* y;
};

// Products of one `x` with matrices of as many columns. With `add` to what is in every y, else in its place.
void quantised_products(const std::vector<Product>& products, const float* x, int64_t tokens, bool add);

// y [tokens, width] = x / rms(x) * weight.
void rms_norm(const float* x, const float* weight, int64_t tokens, int64_t width, float eps, float* y);

struct Expert {
    Matrix gate, up, down;
};

// Token `token` uses an expert with weight `share`.
struct Use {
    int64_t token;
    float share;
};

struct ExpertUses {
    Expert expert;
    std::vector<Use> uses;
};

// y[token] += share * down(silu(gate x) * up x), for every use; x and y are [tokens, hidden].
void apply_experts(const std::vector<ExpertUses>& experts, const float* x, int64_t tokens, int64_t hidden, float* y);

struct DeltaLayer {
    DeltaShape shape;
    const float *convolution, *a_log, *dt_bias, *norm;
    float eps;
};

// `past` [taps - 1, channels] and `state` [value heads, Dv, Dk] are replaced by what follows the tokens.
void gated_delta_net(const DeltaLayer& layer, const float* qkv, const float* z, const float* b, const float* a,
                     int64_t tokens, float* past, float* state, float* y);

struct AttentionLayer {
    AttentionShape shape;
    const double* frequencies; // of each rotated pair, in radians for each position
    float eps;
    const float *q_norm, *k_norm;
};

// `keys` and `values` [kv heads, capacity, D] receive the tokens' own; y [tokens, heads * D].
void gated_attention(const AttentionLayer& layer, const float* q_and_gate, const float* k, const float* v,
                     int64_t tokens, float* keys, float* values, float* y);

} // namespace flashmoe
