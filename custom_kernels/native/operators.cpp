#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "inputs.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace flashmoe {
namespace {

const char* const kBf16 = "avx512_bf16";

std::atomic<const Operations*> chosen{nullptr};
// The operations for products by number and type of vectors, and by format; null stands for `chosen`, and for products of
// many vectors in bf16 for `avx512_bf16`.
std::atomic<const Operations*> chosen_for[5][9][3];

std::atomic<const Operations*>& choice_for(int64_t vectors, Activations type, int bits, int group) {
    const int kind = vectors == 1 ? 0 : vectors <= kFewTokens ? 1 : 2 + static_cast<int>(type);
    return chosen_for[kind][bits][group / 64];
}

const Operations* named(const char* name) {
    for (const Operations* found : all_operations())
        if (std::strcmp(found->name, name) == 0) return found;
    return nullptr;
}

} // namespace

const Operations& operations_for(const Matrix& m, int64_t vectors, Activations type) {
    const Operations* found = choice_for(vectors, type, m.bits, m.group).load(std::memory_order_relaxed);
    return found ? *found : operations();
}

const Multiplication& multiplication(const Matrix& m, Activations type) {
    if (type == Activations::bf16) {
        const Operations* found = choice_for(kFewTokens + 1, type, m.bits, m.group).load(std::memory_order_relaxed);
        return found ? found->rounded : *avx512_bf16();
    }
    const Operations& own = operations_for(m, kFewTokens + 1, type);
    return type == Activations::int8 ? own.bytes : own.floats;
}

std::vector<const Operations*> all_operations() {
    std::vector<const Operations*> all;
    for (const Operations* found : {avx512_vnni_operations(), avx512_operations(), avx2_operations(), neon_operations(),
                                    portable_operations()})
        if (found) all.push_back(found);
    return all;
}

std::vector<const Operations*> operations_in_use() {
    std::vector<const Operations*> used{&operations()};
    for (const Operations* found : all_operations()) {
        bool uses = false;
        for (const auto& by_format : chosen_for)
            for (const auto& by_group : by_format)
                for (const auto& choice : by_group) uses = uses || choice.load() == found;
        if (uses && found != used[0]) used.push_back(found);
    }
    return used;
}

const Operations& operations() {
    const Operations* found = chosen.load(std::memory_order_relaxed);
    if (!found) chosen.store(found = all_operations()[0]);
    return *found;
}

bool choose_operations(const char* name) {
    const Operations* found = std::strcmp(name, "auto") == 0 ? all_operations()[0] : named(name);
    if (!found) return false;
    chosen.store(found);
    for (auto& by_format : chosen_for)
        for (auto& by_group : by_format)
            for (auto& choice : by_group) choice.store(nullptr);
    return true;
}

bool choose_for_products(int64_t vectors, Activations type, int bits, int group, const char* name) {
    const bool in_bf16 = vectors > kFewTokens && type == Activations::bf16 && std::strcmp(name, kBf16) == 0;
    const Operations* found = in_bf16 ? nullptr : named(name);
    if (found || in_bf16) choice_for(vectors, type, bits, group).store(found);
    return found || in_bf16;
}

bool has_activations(Activations type) { return type != Activations::bf16 || avx512_bf16(); }

constexpr int64_t kFilledAtOnce = 1 << 16; // floats

void use_large_pages(float* y, int64_t count) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
    constexpr uintptr_t kPage = 1 << 21;
    const uintptr_t from = (reinterpret_cast<uintptr_t>(y) + kPage - 1) / kPage * kPage;
    const uintptr_t to = reinterpret_cast<uintptr_t>(y + count) / kPage * kPage;
    if (from >= to) return;
    madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE); // both are only advice
    parallel((to - from) / kPage, 1, [&](int64_t begin, int64_t end, int) {
        madvise(reinterpret_cast<void*>(from + begin * kPage), (end - begin) * kPage, MADV_POPULATE_WRITE);
    });
#else
    (void)y, (void)count;
#endif
}

void fill_all(const float* values, int64_t count, float* y) {
    parallel(count, kFilledAtOnce, [&](int64_t begin, int64_t end, int) {
        if (values)
            std::memcpy(y + begin, values + begin, sizeof(float) * (end - begin));
        else
            std::fill(y + begin, y + end, 0.0f);
    });
}

void rms_norm(const float* x, const float* weight, int64_t tokens, int64_t width, float eps, float* y) {
    const Operations& own = operations();
    parallel(tokens, 4, [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) own.rms_norm(x + t * width, weight, width, eps, y + t * width);
    });
}

namespace {

template <typename Sequence>
bool all_have_one_token(const std::vector<Sequence>& sequences) {
    return std::all_of(sequences.begin(), sequences.end(), [](const Sequence& one) { return one.tokens == 1; });
}

// Store the latest inputs of the convolution after `count` tokens `x`, for channels [begin, end).
void keep_inputs(const DeltaShape& shape, const float* x, int64_t count, int64_t begin, int64_t end,
                 float* conv_state) {
    const int64_t channels = shape.channels(), kept = shape.taps - 1;
    for (int64_t row = 0; row < kept; ++row) { // ascending, because the source rows come later
        const int64_t from = row + count;
        const float* source = from < kept ? conv_state + from * channels : x + (from - kept) * channels;
        std::memmove(conv_state + row * channels + begin, source + begin, sizeof(float) * (end - begin));
    }
}

void delta_of_one(const DeltaLayer& layer, const float* qkv, const float* z, const float* b, const float* a,
                  const DeltaSequence& sequence, float* y) {
    const DeltaShape& shape = layer.shape;
    const Operations& own = operations();
    const int64_t channels = shape.channels();
    for (int64_t first = 0; first < sequence.tokens; first += kTile) {
        const int64_t count = std::min<int64_t>(kTile, sequence.tokens - first);
        const float* x = qkv + first * channels;
        float* mixed = scratch<kMixed>(count * channels);
        parallel(channels, count == 1 ? 2048 : 256, [&](int64_t begin, int64_t end, int) {
            own.convolve(sequence.conv_state, x, layer.convolution, count, channels, shape.taps, begin, end, mixed);
            keep_inputs(shape, x, count, begin, end, sequence.conv_state);
        });
        parallel(shape.value_heads, 1, [&](int64_t begin, int64_t end, int) {
            for (int64_t head = begin; head < end; ++head)
                own.delta(shape, head, count, mixed, z + first * shape.value_width(), b + first * shape.value_heads,
                          a + first * shape.value_heads, layer.a_log, layer.dt_bias, layer.norm, layer.eps,
                          sequence.recurrent_state + head * shape.value_dim * shape.key_dim,
                          y + first * shape.value_width(), scratch<kOwn>(2 * shape.key_dim + shape.value_dim));
        });
    }
}

// One token of each sequence, in two loops.
void delta_of_several(const DeltaLayer& layer, const float* qkv, const float* z, const float* b, const float* a,
                      const std::vector<DeltaSequence>& sequences, float* y) {
    const DeltaShape& shape = layer.shape;
    const Operations& own = operations();
    const int64_t channels = shape.channels(), count = static_cast<int64_t>(sequences.size());
    float* mixed = scratch<kMixed>(count * channels);
    parallel(count, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
            const float* x = qkv + i * channels;
            own.convolve(sequences[i].conv_state, x, layer.convolution, 1, channels, shape.taps, 0, channels,
                         mixed + i * channels);
            keep_inputs(shape, x, 1, 0, channels, sequences[i].conv_state);
        }
    });
    parallel(count * shape.value_heads, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t i = item / shape.value_heads, head = item % shape.value_heads;
            own.delta(shape, head, 1, mixed + i * channels, z + i * shape.value_width(), b + i * shape.value_heads,
                      a + i * shape.value_heads, layer.a_log, layer.dt_bias, layer.norm, layer.eps,
                      sequences[i].recurrent_state + head * shape.value_dim * shape.key_dim,
                      y + i * shape.value_width(), scratch<kOwn>(2 * shape.key_dim + shape.value_dim));
        }
    });
}

} // namespace

void gated_delta_net(const DeltaLayer& layer, const float* qkv, const float* z, const float* b, const float* a,
                     const std::vector<DeltaSequence>& sequences, float* y) {
    const DeltaShape& shape = layer.shape;
    if (sequences.size() > 1 && all_have_one_token(sequences))
        return delta_of_several(layer, qkv, z, b, a, sequences, y);
    for (const DeltaSequence& one : sequences) {
        delta_of_one(layer, qkv, z, b, a, one, y);
        qkv += one.tokens * shape.channels(), z += one.tokens * shape.value_width();
        b += one.tokens * shape.value_heads, a += one.tokens * shape.value_heads;
        y += one.tokens * shape.value_width();
    }
}

namespace {

// Normalize and rotate one head's vector; `rotations` holds the cosines, then the sines of its position.
void place(const Operations& own, const AttentionLayer& layer, const float* x, const float* norm,
           const float* rotations, float* out) {
    own.rms_norm(x, norm, layer.shape.head_dim, layer.eps, out);
    const int64_t pairs = layer.shape.rotary_dim / 2;
    for (int64_t i = 0; i < pairs; ++i) {
        const float low = out[i], high = out[i + pairs], cosine = rotations[i], sine = rotations[i + pairs];
        out[i] = low * cosine - high * sine;
        out[i + pairs] = high * cosine + low * sine;
    }
}

// A token whose queries attend, in spans of keys.
struct Row {
    const AttentionSequence* sequence;
    int64_t position, span, first_span;

    int64_t spans() const { return (position + span) / span; } // of position + 1 keys
};

// Return the keys of a span, when threads share the keys of a single token.
int64_t shared_span(int64_t keys) { return std::max<int64_t>(128, (keys + 8 * threads() - 1) / (8 * threads())); }

// Compute the cosines, then the sines, of the positions of `rows`.
std::vector<float> rotations_of(const AttentionLayer& layer, const std::vector<Row>& rows) {
    const int64_t pairs = layer.shape.rotary_dim / 2;
    std::vector<float> rotations(rows.size() * 2 * pairs);
    float* to = rotations.data();
    for (const Row& row : rows) {
        for (int64_t i = 0; i < pairs; ++i) {
            const double angle = static_cast<double>(row.position) * layer.frequencies[i];
            to[i] = static_cast<float>(std::cos(angle));
            to[pairs + i] = static_cast<float>(std::sin(angle));
        }
        to += 2 * pairs;
    }
    return rotations;
}

// Store the keys and values of `rows` in their caches; return their queries [row][heads][D].
const float* place_all(const AttentionLayer& layer, const float* q_and_gate, const float* k, const float* v,
                       const std::vector<Row>& rows) {
    const AttentionShape& shape = layer.shape;
    const Operations& own = operations();
    const int64_t heads = shape.heads, kv_heads = shape.kv_heads, dim = shape.head_dim;
    const int64_t count = static_cast<int64_t>(rows.size());
    float* queries = scratch<kQueries>(count * heads * dim);
    const std::vector<float> rotations = rotations_of(layer, rows);
    parallel(count * (heads + kv_heads), 32, [&](int64_t begin, int64_t end, int) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t t = item / (heads + kv_heads), head = item % (heads + kv_heads);
            const float* own_rotations = rotations.data() + t * shape.rotary_dim;
            if (head < heads) {
                place(own, layer, q_and_gate + (t * heads + head) * layer.query_width(), layer.q_norm, own_rotations,
                      queries + (t * heads + head) * dim);
                continue;
            }
            const AttentionSequence& sequence = *rows[t].sequence;
            const int64_t kv = head - heads, row = kv * sequence.capacity + rows[t].position;
            float* placed = scratch<kOwn>(dim);
            place(own, layer, k + (t * kv_heads + kv) * dim, layer.k_norm, own_rotations, placed);
            own.store_row(placed, layer.rows, sequence.keys + row * layer.rows.row_bytes());
            own.store_row(v + (t * kv_heads + kv) * dim, layer.rows, sequence.values + row * layer.rows.row_bytes());
        }
    });
    return queries;
}

// Attend from each of `rows` in its spans of keys, apply the gate, and store the results.
void attend_in_spans(const AttentionLayer& layer, const float* queries, const float* q_and_gate,
                     std::vector<Row>& rows, float* y) {
    const AttentionShape& shape = layer.shape;
    const Operations& own = operations();
    const int64_t heads = shape.heads, kv_heads = shape.kv_heads, dim = shape.head_dim, group = heads / kv_heads;
    const int64_t count = static_cast<int64_t>(rows.size()), part = group * (dim + 2); // sums, then peak and weight
    int64_t spans = 0;
    for (Row& row : rows) row.first_span = spans, spans += row.spans();
    std::vector<int64_t> row_of(spans);
    for (int64_t t = 0; t < count; ++t)
        std::fill_n(row_of.begin() + rows[t].first_span, rows[t].spans(), t);
    float* partial = scratch<kPartial>(spans * kv_heads * part);
    parallel(spans * kv_heads, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t kv = item % kv_heads, t = row_of[item / kv_heads];
            const Row& row = rows[t];
            const int64_t s = item / kv_heads - row.first_span;
            const int64_t at = kv * row.sequence->capacity * layer.rows.row_bytes();
            float* to = partial + item * part;
            own.attend(queries + (t * heads + kv * group) * dim, group, layer.rows, row.sequence->keys + at,
                       row.sequence->values + at, s * row.span, std::min(row.position + 1, (s + 1) * row.span), to,
                       to + group * dim, scratch<kOwn>((group + dim) * 64));
        }
    });
    parallel(count * heads, 32, [&](int64_t begin, int64_t end, int) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t t = item / heads, head = item % heads, kv = head / group, h = head % group;
            const float* parts = partial + (rows[t].first_span * kv_heads + kv) * part;
            const int64_t own_spans = rows[t].spans(), stride = kv_heads * part;
            float peak = -INFINITY, total = 0.0f;
            for (int64_t s = 0; s < own_spans; ++s) peak = std::max(peak, parts[s * stride + group * dim + 2 * h]);
            float* out = y + item * dim;
            std::fill(out, out + dim, 0.0f);
            for (int64_t s = 0; s < own_spans; ++s) {
                const float* peaks = parts + s * stride + group * dim + 2 * h;
                const float factor = std::exp(peaks[0] - peak);
                total += factor * peaks[1];
                for (int64_t i = 0; i < dim; ++i) out[i] += factor * parts[s * stride + h * dim + i];
            }
            for (int64_t i = 0; i < dim; ++i) out[i] /= total;
            if (layer.gated) own.gate(out, q_and_gate + item * 2 * dim + dim, dim);
        }
    });
}

// Attend from successive tokens of one sequence, of which the first is at `position`, in blocks of tokens.
void attend_in_blocks(const AttentionLayer& layer, const float* queries, const float* q_and_gate,
                      const AttentionSequence& sequence, int64_t position, int64_t count, float* y) {
    const AttentionShape& shape = layer.shape;
    const Operations& own = operations();
    const int64_t heads = shape.heads, kv_heads = shape.kv_heads, dim = shape.head_dim, group = heads / kv_heads;
    const Parts blocks(count, own.attend_block(group));
    parallel(kv_heads * blocks.parts, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t kv = item % kv_heads, part = item / kv_heads, t = blocks.begin(part);
            const int64_t at = (t * heads + kv * group) * dim, first = kv * sequence.capacity * layer.rows.row_bytes();
            own.attend_many(queries + at, heads * dim, blocks.size(part), group, layer.rows, sequence.keys + first,
                            sequence.values + first, position + t + 1, y + at,
                            scratch<kOwn>(own.attend_scratch(group, dim)));
        }
    });
    if (!layer.gated) return;
    parallel(count * heads, 32, [&](int64_t begin, int64_t end, int) {
        for (int64_t item = begin; item < end; ++item)
            own.gate(y + item * dim, q_and_gate + item * 2 * dim + dim, dim);
    });
}

} // namespace

void gated_attention(const AttentionLayer& layer, const float* q_and_gate, const float* k, const float* v,
                     const std::vector<AttentionSequence>& sequences, float* y) {
    const AttentionShape& shape = layer.shape;
    const int64_t width = shape.heads * shape.head_dim, kv_width = shape.kv_heads * shape.head_dim;
    std::vector<Row> rows;
    const auto process = [&](bool in_blocks) {
        const float* queries = place_all(layer, q_and_gate, k, v, rows);
        const int64_t count = static_cast<int64_t>(rows.size());
        if (in_blocks)
            attend_in_blocks(layer, queries, q_and_gate, *rows[0].sequence, rows[0].position, count, y);
        else
            attend_in_spans(layer, queries, q_and_gate, rows, y);
        q_and_gate += count * shape.heads * layer.query_width(), k += count * kv_width, v += count * kv_width;
        y += count * width;
        rows.clear();
    };
    if (all_have_one_token(sequences)) { // each in the same spans as alone, so that results are equal
        for (const AttentionSequence& one : sequences) rows.push_back({&one, one.start, shared_span(one.start + 1), 0});
        if (!rows.empty()) process(false);
        return;
    }
    for (const AttentionSequence& one : sequences)
        for (int64_t first = 0; first < one.tokens; first += kTile) {
            const int64_t count = std::min<int64_t>(kTile, one.tokens - first), end = one.start + first + count;
            const int64_t span = count > 1 ? end : shared_span(end); // threads share the tokens, or a token's keys
            for (int64_t t = 0; t < count; ++t) rows.push_back({&one, one.start + first + t, span, 0});
            process(count > kFewTokens);
        }
}

} // namespace flashmoe
