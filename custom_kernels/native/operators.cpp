#include "operators.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>

#include "pool.hpp"

namespace flashmoe {
namespace {

std::atomic<const Operations*> chosen{nullptr};
// The operations for products by number and type of vectors, and by format; null stands for `chosen`.
std::atomic<const Operations*> chosen_for[4][9][3];

std::atomic<const Operations*>& choice_for(int64_t vectors, Activations type, int bits, int group) {
    const int kind = vectors == 1 ? 0 : vectors <= kFewTokens ? 1 : type == Activations::int8 ? 3 : 2;
    return chosen_for[kind][bits][group / 64];
}

const Operations* named(const char* name) {
    for (const Operations* found : all_operations())
        if (std::strcmp(found->name, name) == 0) return found;
    return nullptr;
}

// Memory that a thread keeps between calls, so that the system does not clear new pages every time. It is aligned to a
// cache line, because vectors across two lines take twice as long to load.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    ~Scratch() { ::operator delete[](memory_, kLine); }

    float* room(int64_t count) {
        if (size_ < count) {
            ::operator delete[](memory_, kLine);
            memory_ = nullptr, size_ = 0;
            memory_ = static_cast<float*>(::operator new[](sizeof(float) * count, kLine));
            size_ = count;
        }
        return memory_;
    }

private:
    static constexpr std::align_val_t kLine{64};
    float* memory_ = nullptr;
    int64_t size_ = 0;
};

template <int PURPOSE>
float* scratch(int64_t count) {
    thread_local Scratch memory;
    return memory.room(count);
}

enum Purpose { kPacked, kArranged, kHidden, kHiddenPacked, kMixed, kQueries, kPartial, kOwn, kOwnTile, kOwnUp, kUp };

constexpr int64_t kBytesAtOnce = 24 * 1024; // bytes of weights per step of a thread, so that all end together

int64_t rows_at_once(const Matrix& m) {
    const int64_t row = m.row_bytes() + 2 * m.scale_row_bytes();
    return std::max<int64_t>(8, kBytesAtOnce / row / 8 * 8); // whole blocks of rows
}

constexpr int64_t kTokensAtOnce = 256; // tokens for which a panel is unpacked once

bool same_format(const Matrix& a, const Matrix& b) {
    return a.bits == b.bits && a.group == b.group && a.columns == b.columns;
}

const Operations& operations_for(const Matrix& m, int64_t vectors, Activations type = Activations::f32) {
    const Operations* found = choice_for(vectors, type, m.bits, m.group).load(std::memory_order_relaxed);
    return found ? *found : operations();
}

// Return the products of more than kFewTokens vectors of a type that `has_activations`.
const Multiplication& multiplication(const Matrix& m, Activations type) {
    if (type == Activations::bf16) return *avx512_bf16();
    const Operations& own = operations_for(m, kFewTokens + 1, type);
    return type == Activations::int8 ? own.bytes : own.floats;
}

// `count` vectors that are prepared for `dot` with a matrix's format.
struct Prepared {
    const Operations& own;
    int64_t bytes;
    uint8_t* memory;

    static int64_t size(const Matrix& m, int64_t count) {
        return count * operations_for(m, count).vector_bytes(m.columns, m.group) / 4; // floats
    }
    Prepared(const Matrix& m, int64_t count, float* memory_)
        : own(operations_for(m, count)), bytes(own.vector_bytes(m.columns, m.group)),
          memory(reinterpret_cast<uint8_t*>(memory_)) {}
    uint8_t* vector(int64_t i) const { return memory + i * bytes; }

    // `row(i)` returns vector i.
    template <typename Row>
    void fill(const Matrix& m, int64_t count, const Row& row) const {
        parallel(count, 4, [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; ++i) own.prepare(row(i), m.columns, m.bits, m.group, vector(i));
        });
    }
};

// Vectors that are prepared for both matrices that read them, once if these have one format.
struct PreparedInputs {
    Prepared gate, up;

    static int64_t size(const Expert& e, int64_t count) {
        return Prepared::size(e.gate, count) + (same_format(e.gate, e.up) ? 0 : Prepared::size(e.up, count));
    }
    PreparedInputs(const Expert& e, int64_t count, float* memory)
        : gate(e.gate, count, memory),
          up(e.up, count, same_format(e.gate, e.up) ? memory : memory + Prepared::size(e.gate, count)) {}

    template <typename Row>
    void fill(const Expert& e, int64_t count, const Row& row) const {
        gate.fill(e.gate, count, row);
        if (!same_format(e.gate, e.up)) up.fill(e.up, count, row);
    }
};

// Store rows [begin, end) times vectors [0, count), count <= kFewTokens, in to[t * stride + row - begin].
void few(const Matrix& m, int64_t begin, int64_t end, const Prepared& x, int64_t count, float* to, int64_t stride) {
    const uint8_t* vectors[kMostTokens];
    float* out[kMostTokens];
    for (int64_t first = 0; first < count; first += kMostTokens) {
        const int tokens = static_cast<int>(std::min<int64_t>(kMostTokens, count - first));
        for (int t = 0; t < tokens; ++t) vectors[t] = x.vector(first + t), out[t] = to + (first + t) * stride;
        x.own.dot(m, begin, end, tokens, vectors, out);
    }
}

// Vectors that are arranged for products of many vectors with matrices of a format; `row(i)` returns vector i.
class Arranged {
public:
    template <typename Row>
    Arranged(const Multiplication& how, const Matrix& m, int64_t count, const Row& row) : how_(how), count_(count) {
        const int64_t bytes = how.vector_bytes(m.columns, m.group);
        memory_ = reinterpret_cast<uint8_t*>(scratch<kArranged>(count * bytes / 4));
        const Parts blocks(count, how.block);
        parallel(blocks.parts, 1, [&](int64_t begin, int64_t end, int) {
            std::vector<const float*> rows(how.block);
            for (int64_t i = begin; i < end; ++i) {
                const int64_t first = blocks.begin(i), size = blocks.size(i);
                for (int64_t t = 0; t < size; ++t) rows[t] = row(first + t);
                how.arrange(rows.data(), static_cast<int>(size), m.columns, m.bits, m.group, memory_ + first * bytes);
            }
        });
    }

    // Call f(first, rows) for all panels of `rows` rows.
    template <typename Function>
    void panels(int64_t rows, const Function& f) const {
        parallel((rows + how_.rows - 1) / how_.rows, 1, [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; ++i) f(i * how_.rows, std::min(how_.rows, rows - i * how_.rows));
        });
    }

    // Return the products with a panel of `m`, [vector][rows of a panel]; PURPOSE says which memory of the thread to use.
    template <Purpose PURPOSE>
    float* times(const Matrix& m, int64_t first) const {
        float* tile = scratch<PURPOSE>(count_ * how_.rows);
        how_.multiply(m, first, count_, memory_, tile, scratch<kOwn>(how_.scratch(m)));
        return tile;
    }

private:
    const Multiplication& how_;
    const int64_t count_;
    uint8_t* memory_;
};

// Store the products of many vectors in to[vector * m.rows + row].
template <typename Row>
void multiply_all(const Matrix& m, int64_t count, const Row& row, Activations type, float* to) {
    const Multiplication& how = multiplication(m, type);
    const Arranged inputs(how, m, count, row);
    inputs.panels(m.rows, [&](int64_t first, int64_t rows) {
        const float* tile = inputs.times<kOwnTile>(m, first);
        for (int64_t t = 0; t < count; ++t)
            std::memcpy(to + t * m.rows + first, tile + t * how.rows, sizeof(float) * rows);
    });
}

// Call f(first, count) for blocks of tokens for which panels are unpacked once.
template <typename Function>
void token_blocks(int64_t tokens, const Function& f) {
    const Parts blocks(tokens, kTokensAtOnce);
    for (int64_t i = 0; i < blocks.parts; ++i) f(blocks.begin(i), blocks.size(i));
}

// Add an output times its routing weight; all sums of outputs are made here, so that they are equal to the last bit.
inline void add_weighted(float* y, float routing_weight, const float* out, int64_t count) {
    for (int64_t r = 0; r < count; ++r) y[r] += routing_weight * out[r];
}

// One expert and one block of the tokens that use it; `take(use, row, rows, out)` receives parts of the outputs.
template <typename Take>
void apply_to_block(const Expert& e, const Use* uses, int64_t count, const float* x, int64_t hidden, Activations type,
                    bool of_few, const Take& take) {
    const int64_t inner = e.gate.rows;
    const auto input = [&](int64_t i) { return x + uses[i].token * hidden; };
    const Operations& own = operations();
    const Multiplication& how = multiplication(e.gate, type);
    if (count <= (of_few ? kFewTokens : how.few)) {
        const PreparedInputs prepared(e, count, scratch<kPacked>(PreparedInputs::size(e, count)));
        prepared.fill(e, count, input);
        float* middle = scratch<kHidden>(count * inner);
        parallel(inner, rows_at_once(e.gate), [&](int64_t begin, int64_t end, int) {
            const int64_t rows = end - begin;
            float* up = scratch<kOwnUp>(count * rows);
            few(e.gate, begin, end, prepared.gate, count, middle + begin, inner);
            few(e.up, begin, end, prepared.up, count, up, rows);
            for (int64_t t = 0; t < count; ++t) own.swiglu(middle + t * inner + begin, up + t * rows, rows);
        });
        const Prepared prepared_middle(e.down, count, scratch<kHiddenPacked>(Prepared::size(e.down, count)));
        prepared_middle.fill(e.down, count, [&](int64_t i) { return middle + i * inner; });
        parallel(hidden, rows_at_once(e.down), [&](int64_t begin, int64_t end, int) {
            const int64_t rows = end - begin;
            float* out = scratch<kOwnTile>(count * rows);
            few(e.down, begin, end, prepared_middle, count, out, rows);
            for (int64_t t = 0; t < count; ++t) take(uses[t], begin, rows, out + t * rows);
        });
        return;
    }
    float* middle = scratch<kHidden>(count * inner);
    if (same_format(e.gate, e.up)) {
        const Arranged inputs(how, e.gate, count, input);
        inputs.panels(inner, [&](int64_t first, int64_t rows) {
            float *gate = inputs.times<kOwnTile>(e.gate, first), *up = inputs.times<kOwnUp>(e.up, first);
            own.swiglu(gate, up, count * how.rows);
            for (int64_t t = 0; t < count; ++t)
                std::memcpy(middle + t * inner + first, gate + t * how.rows, sizeof(float) * rows);
        });
    } else {
        float* up = scratch<kUp>(count * inner);
        multiply_all(e.gate, count, input, type, middle);
        multiply_all(e.up, count, input, type, up);
        parallel(count, 1, [&](int64_t begin, int64_t end, int) {
            own.swiglu(middle + begin * inner, up + begin * inner, (end - begin) * inner);
        });
    }
    const Multiplication& how_down = multiplication(e.down, type);
    const Arranged middles(how_down, e.down, count, [&](int64_t i) { return middle + i * inner; });
    middles.panels(hidden, [&](int64_t first, int64_t rows) {
        const float* out = middles.times<kOwnTile>(e.down, first);
        for (int64_t t = 0; t < count; ++t) take(uses[t], first, rows, out + t * how_down.rows);
    });
}

// Apply all experts of one token in two loops; this is the decode step. `take` is as for `apply_to_block`.
template <typename Take>
void apply_to_one(const std::vector<ExpertUses>& experts, const float* x, int64_t hidden, const Take& take) {
    const Operations& own = operations();
    const int64_t count = static_cast<int64_t>(experts.size());
    std::vector<int64_t> starts(count + 1, 0);
    std::vector<PreparedInputs> inputs;
    int64_t memory = 0, widest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const Expert& e = experts[i].expert;
        starts[i + 1] = starts[i] + e.gate.rows;
        memory += PreparedInputs::size(e, 1);
        widest = std::max(widest, Prepared::size(e.down, 1));
    }
    float* free = scratch<kPacked>(memory);
    for (int64_t i = 0; i < count; ++i) {
        const Expert& e = experts[i].expert;
        if (i > 0 && same_format(e.gate, experts[i - 1].expert.gate) && same_format(e.up, experts[i - 1].expert.up)) {
            inputs.push_back(inputs.back());
            continue;
        }
        inputs.emplace_back(e, 1, free);
        free += PreparedInputs::size(e, 1);
        inputs.back().fill(e, 1, [&](int64_t) { return x; });
    }
    float* middle = scratch<kHidden>(starts[count]);
    const Matrix& first = experts[0].expert.gate;
    parallel(starts[count], std::max<int64_t>(8, rows_at_once(first) / 2), [&](int64_t begin, int64_t end, int) {
        int64_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
        while (begin < end) {
            const Expert& e = experts[i].expert;
            const int64_t stop = std::min(end, starts[i + 1]), rows = stop - begin, row = begin - starts[i];
            float* up = scratch<kOwnUp>(rows);
            few(e.gate, row, row + rows, inputs[i].gate, 1, middle + begin, rows);
            few(e.up, row, row + rows, inputs[i].up, 1, up, rows);
            own.swiglu(middle + begin, up, rows);
            begin = stop, ++i;
        }
    });
    float* packed_memory = scratch<kHiddenPacked>(widest * count);
    std::vector<Prepared> middles;
    for (int64_t i = 0; i < count; ++i) {
        middles.emplace_back(experts[i].expert.down, 1, packed_memory + widest * i);
        middles.back().fill(experts[i].expert.down, 1, [&](int64_t) { return middle + starts[i]; });
    }
    const int64_t step = std::max<int64_t>(8, rows_at_once(experts[0].expert.down) / count);
    parallel(hidden, step, [&](int64_t begin, int64_t end, int) {
        const int64_t rows = end - begin;
        float* out = scratch<kOwnTile>(rows);
        for (int64_t i = 0; i < count; ++i) {
            few(experts[i].expert.down, begin, end, middles[i], 1, out, rows);
            take(experts[i].uses[0], begin, rows, out);
        }
    });
}

} // namespace

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
    const Operations* found = named(name);
    if (found) choice_for(vectors, type, bits, group).store(found);
    return found;
}

namespace {

// Compute all products of up to kFewTokens vectors in one loop.
void multiply_few(const std::vector<Product>& products, const float* x, int64_t count, int64_t first, bool add) {
    const int64_t matrices = static_cast<int64_t>(products.size());
    std::vector<int64_t> starts(matrices + 1, 0);
    std::vector<Prepared> inputs;
    int64_t memory = 0;
    for (const Product& one : products) memory += Prepared::size(one.matrix, count);
    float* free = scratch<kPacked>(memory);
    for (int64_t i = 0; i < matrices; ++i) {
        const Matrix& m = products[i].matrix;
        starts[i + 1] = starts[i] + m.rows;
        int64_t same = 0;
        while (same < i && !same_format(m, products[same].matrix)) ++same;
        inputs.push_back(same < i ? inputs[same] : Prepared(m, count, free));
        if (same < i) continue;
        free += Prepared::size(m, count);
        inputs[i].fill(m, count, [&](int64_t t) { return x + t * m.columns; });
    }
    parallel(starts[matrices], rows_at_once(products[0].matrix), [&](int64_t begin, int64_t end, int) {
        int64_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
        for (; begin < end; begin = starts[++i]) {
            const Matrix& m = products[i].matrix;
            const int64_t row = begin - starts[i], rows = std::min(end, starts[i + 1]) - begin;
            float* out = products[i].y + first * m.rows + row;
            if (!add) {
                few(m, row, row + rows, inputs[i], count, out, m.rows);
                continue;
            }
            float* own = scratch<kOwnTile>(count * rows);
            few(m, row, row + rows, inputs[i], count, own, rows);
            for (int64_t t = 0; t < count; ++t)
                for (int64_t r = 0; r < rows; ++r) out[t * m.rows + r] += own[t * rows + r];
        }
    });
}

void multiply_many(const Product& product, const float* x, int64_t count, int64_t first, bool add,
                   Activations type) {
    const Matrix& m = product.matrix;
    const Multiplication& how = multiplication(m, type);
    const Arranged inputs(how, m, count, [&](int64_t t) { return x + t * m.columns; });
    inputs.panels(m.rows, [&](int64_t row, int64_t rows) {
        const float* tile = inputs.times<kOwnTile>(m, row);
        for (int64_t t = 0; t < count; ++t) {
            float* out = product.y + (first + t) * m.rows + row;
            for (int64_t r = 0; r < rows; ++r) out[r] = (add ? out[r] : 0.0f) + tile[t * how.rows + r];
        }
    });
}

} // namespace

bool has_activations(Activations type) { return type != Activations::bf16 || avx512_bf16(); }

void quantized_products(const std::vector<Product>& products, const float* x, int64_t tokens, bool add,
                        Activations type) {
    if (products.empty()) return;
    const int64_t columns = products[0].matrix.columns;
    token_blocks(tokens, [&](int64_t first, int64_t count) {
        if (count <= kFewTokens) return multiply_few(products, x + first * columns, count, first, add);
        for (const Product& one : products) multiply_many(one, x + first * columns, count, first, add, type);
    });
}

void rms_norm(const float* x, const float* weight, int64_t tokens, int64_t width, float eps, float* y) {
    const Operations& own = operations();
    parallel(tokens, 4, [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) own.rms_norm(x + t * width, weight, width, eps, y + t * width);
    });
}

namespace {

template <typename Take>
void apply(const std::vector<ExpertUses>& experts, const float* x, int64_t tokens, int64_t hidden, Activations type,
           const Take& take) {
    if (experts.empty()) return;
    if (tokens == 1) return apply_to_one(experts, x, hidden, take);
    for (const ExpertUses& one : experts)
        token_blocks(static_cast<int64_t>(one.uses.size()), [&](int64_t first, int64_t count) {
            apply_to_block(one.expert, one.uses.data() + first, count, x, hidden, type, tokens <= kFewTokens, take);
        });
}

} // namespace

void apply_experts(const std::vector<ExpertUses>& experts, const float* x, int64_t tokens, int64_t hidden, float* y,
                   Activations type) {
    apply(experts, x, tokens, hidden, type, [&](const Use& use, int64_t row, int64_t rows, const float* out) {
        add_weighted(y + use.token * hidden + row, use.routing_weight, out, rows);
    });
}

void expert_outputs(const std::vector<ExpertUses>& experts, const float* x, int64_t tokens, int64_t hidden,
                    int64_t columns, float* outputs) {
    const auto store = [&](const Use& use, int64_t row, int64_t rows, const float* out) {
        std::memcpy(outputs + (use.token * columns + use.choice) * hidden + row, out, sizeof(float) * rows);
    };
    apply(experts, x, tokens, hidden, Activations::f32, store);
}

void add_outputs(const float* outputs, const float* routing_weights, int64_t tokens, int64_t columns, int64_t hidden,
                 float* y) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = t * columns; i < (t + 1) * columns; ++i)
            add_weighted(y + t * hidden, routing_weights[i], outputs + i * hidden, hidden);
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
