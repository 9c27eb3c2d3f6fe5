// The operations on whole arrays, whose work the threads share.
#pragma once

#include <vector>

#include "operations.hpp"

namespace flashmoe {

// Return the operations that `choose_operations` selected; without a selection, the best operations for this machine.
const Operations& operations();

// Return the instruction sets of this machine, the best first, and the instruction sets in use by an operation.
std::vector<const Operations*> all_operations();
std::vector<const Operations*> operations_in_use();

// Select an instruction set by name, the best for "auto", for all operations; return false if this machine lacks it.
bool choose_operations(const char* name);

// The type of vectors in products of more than kFewTokens vectors.
enum class Activations : int { f32 = 0, bf16 = 1, int8 = 2 };

// Return whether this machine and this build have products with vectors of a type.
bool has_activations(Activations type);

// Select an instruction set by name for products with matrices of a format: of one vector, of 2 to kFewTokens, or of more
// vectors of a type. For vectors in bf16 "avx512_bf16" multiplies pairs, and all others round, then multiply floats. Return
// false if this machine lacks it.
bool choose_for_products(int64_t vectors, Activations type, int bits, int group, const char* name);

// A matrix and the result y [tokens, rows] = x [tokens, columns] times its transpose.
struct Product {
    Matrix matrix;
    float* y;
};

// Compute products of `x` with matrices of the same number of columns; with `add`, add them to the results.
void quantized_products(const std::vector<Product>& products, const float* x, int64_t tokens, bool add,
                        Activations type);

// Let the threads share the work of the system for the pages of y, which nobody has written to, large pages if it has them.
// Threads that write to one page at once would each clear one.
void use_large_pages(float* y, int64_t count);

// Store `count` values in y, zeros for a null pointer.
void fill_all(const float* values, int64_t count, float* y);

// Compute y [tokens, width] = x / rms(x) * weight.
void rms_norm(const float* x, const float* weight, int64_t tokens, int64_t width, float eps, float* y);

struct Expert {
    Matrix gate, up, down;
};

// The use of an expert by token `token`, with a routing weight; `choice` is its place among the token's choices.
struct Use {
    int64_t token;
    float routing_weight;
    int64_t choice = 0;
};

struct ExpertUses {
    Expert expert;
    std::vector<Use> uses;
};

// Compute y[token] += routing_weight * down(silu(gate x) * up x) for every use; x and y are [tokens, hidden].
void apply_experts(const std::vector<ExpertUses>& experts, const float* x, int64_t tokens, int64_t hidden, float* y,
                   Activations type);

// Compute outputs[token, choice] = down(silu(gate x) * up x) for every use, without weights, of at most kFewTokens
// tokens; x is [tokens, hidden], outputs [tokens, columns, hidden].
void expert_outputs(const std::vector<ExpertUses>& experts, const float* x, int64_t tokens, int64_t hidden,
                    int64_t columns, float* outputs);

// Compute y[token] += routing_weights[token, i] * outputs[token, i] for ascending i. With the outputs of
// `expert_outputs`, computed in any order and by any number of calls, the sums equal those of `apply_experts` to the
// last bit if the experts of a token are in the order of its choices.
void add_outputs(const float* outputs, const float* routing_weights, int64_t tokens, int64_t columns, int64_t hidden,
                 float* y);

struct DeltaLayer {
    DeltaShape shape;
    const float *convolution, *a_log, *dt_bias, *norm;
    float eps;
};

// A sequence with new tokens, and its states: `conv_state` [taps - 1, channels], `recurrent_state` [value heads, Dv, Dk].
struct DeltaSequence {
    int64_t tokens;
    float *conv_state, *recurrent_state;
};

// Compute y for the new tokens of all sequences, one sequence after the other, and replace the states by their values
// after the tokens.
void gated_delta_net(const DeltaLayer& layer, const float* qkv, const float* z, const float* b, const float* a,
                     const std::vector<DeltaSequence>& sequences, float* y);

struct AttentionLayer {
    AttentionShape shape;
    RowFormat rows;
    const double* frequencies; // of each rotated pair, in radians per position
    float eps;
    bool gated; // whether a gate beside every query multiplies the result of its head
    const float *q_norm, *k_norm;

    // Floats of a head in the projection of queries.
    int64_t query_width() const { return shape.head_dim * (gated ? 2 : 1); }
};

// A sequence with new tokens, the first at position `start`, and its caches, rows [kv heads, capacity].
struct AttentionSequence {
    int64_t tokens, start, capacity;
    uint8_t *keys, *values;
};

// Store the keys and values of the new tokens of all sequences, one sequence after the other, in their caches, and
// compute y [tokens, heads * D].
void gated_attention(const AttentionLayer& layer, const float* q_and_gate, const float* k, const float* v,
                     const std::vector<AttentionSequence>& sequences, float* y);

} // namespace flashmoe
