#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "inputs.hpp"

namespace flashmoe {
namespace {

// Add an output times its routing weight; all sums of outputs are made here, so that they are equal to the last bit.
inline void add_weighted(float* y, float routing_weight, const float* out, int64_t count) {
    for (int64_t r = 0; r < count; ++r) y[r] += routing_weight * out[r];
}

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

// Apply an expert of at most kFewTokens tokens in loops over steps of rows. Its matrices are then read as one stream each,
// which takes less time than the loops of `apply_together`. `take` is as for `apply_together`.
template <typename Take>
void apply_to_few(const ExpertUses& of, const float* x, int64_t hidden, const Take& take) {
    const Expert& e = of.expert;
    const Operations& own = operations();
    const int64_t inner = e.gate.rows, count = static_cast<int64_t>(of.uses.size());
    const PreparedInputs prepared(e, count, scratch<kPacked>(PreparedInputs::size(e, count)));
    prepared.fill(e, count, [&](int64_t i) { return x + of.uses[i].token * hidden; });
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
        for (int64_t t = 0; t < count; ++t) take(of.uses[t], begin, rows, out + t * rows);
    });
}

// Vectors for products with matrices of one format: prepared for `dot` if they are few, else arranged.
class Inputs {
public:
    // `most` is the largest number of vectors that count as few.
    Inputs(const Matrix& m, int64_t count, int64_t most, Activations type)
        : format_(m), count_(count), few_(count <= most), how_(multiplication(m, type)) {}

    int64_t size() const { return few_ ? Prepared::size(format_, count_) : Arranged::size(how_, format_, count_); } // floats

    void place(float* memory) {
        if (few_)
            prepared_.emplace(format_, count_, memory);
        else
            arranged_.emplace(how_, format_, count_, count_, memory);
    }

    // Return the number of items to fill.
    int64_t items() const { return few_ ? count_ : arranged_->blocks(); }

    // Fill an item; `row(i)` returns vector i.
    template <typename Row>
    void fill(int64_t item, const Row& row) const {
        if (few_)
            prepared_->own.prepare(row(item), format_.columns, format_.bits, format_.group, prepared_->vector(item));
        else
            arranged_->fill(item, row);
    }

    // Store the products with rows [first, first + rows) of `m`; see `Arranged::times`.
    void times(const Matrix& m, int64_t first, int64_t rows, float* to) const {
        if (few_)
            few(m, first, first + rows, *prepared_, count_, to, kRows);
        else
            arranged_->times(m, first, rows, 0, to);
    }

private:
    Matrix format_;
    int64_t count_;
    bool few_;
    const Multiplication& how_;
    std::optional<Prepared> prepared_;
    std::optional<Arranged> arranged_;
};

// An expert and tokens that use it, at most kTokensAtOnce.
struct Work {
    const Expert* expert;
    const Use* uses;
    int64_t count;
    Inputs gate, down;
    std::optional<Inputs> up; // if the format is not that of `gate`
    float* middle = nullptr;  // [count, inner]

    Work(const Expert& e, const Use* uses_, int64_t count_, Activations type)
        : expert(&e), uses(uses_), count(count_), gate(inputs(e.gate, type)), down(inputs(e.down, type)) {
        if (!same_format(e.gate, e.up)) up.emplace(inputs(e.up, type));
    }

    int64_t inner() const { return expert->gate.rows; }
    int64_t size() const { return aligned(gate.size()) + (up ? aligned(up->size()) : 0); }
    static int64_t aligned(int64_t floats) { return (floats + kLanes - 1) / kLanes * kLanes; }

private:
    Inputs inputs(const Matrix& m, Activations type) const {
        return {m, count, multiplication(expert->gate, type).few, type};
    }
};

// Apply experts in four loops. Each thread adds the outputs of a range of rows in the order of the experts, so that sums
// do not depend on the threads. `take(use, row, rows, out)` receives parts of the outputs.
template <typename Take>
void apply_together(std::vector<Work>& all, const float* x, int64_t hidden, const Take& take) {
    const Operations& own = operations();
    int64_t memory = 0, middles = 0, down_memory = 0, most = 0;
    for (const Work& one : all) {
        memory += one.size(), middles += one.count * one.inner(), down_memory += Work::aligned(one.down.size());
        most = std::max(most, one.count);
    }
    float *free = scratch<kArranged>(memory), *free_middle = scratch<kHidden>(middles);
    float* free_down = scratch<kHiddenPacked>(down_memory);
    Joined gates, ups, panels, downs;
    for (Work& one : all) {
        one.gate.place(free), free += Work::aligned(one.gate.size());
        if (one.up) one.up->place(free), free += Work::aligned(one.up->size());
        one.middle = free_middle, free_middle += one.count * one.inner();
        one.down.place(free_down), free_down += Work::aligned(one.down.size());
        gates.add(one.gate.items()), ups.add(one.up ? one.up->items() : 0), downs.add(one.down.items());
        panels.add((one.inner() + kRows - 1) / kRows);
    }
    const auto input = [&](const Work& one) {
        return [&](int64_t i) { return x + one.uses[i].token * hidden; };
    };
    parallel(gates.count(), 1, [&](int64_t begin, int64_t end, int) {
        gates.each(begin, end, [&](size_t i, int64_t item) { all[i].gate.fill(item, input(all[i])); });
    });
    parallel(ups.count(), 1, [&](int64_t begin, int64_t end, int) {
        ups.each(begin, end, [&](size_t i, int64_t item) { all[i].up->fill(item, input(all[i])); });
    });
    parallel(panels.count(), 1, [&](int64_t begin, int64_t end, int) {
        float *gate = scratch<kOwnTile>(most * kRows), *up = scratch<kOwnUp>(most * kRows);
        panels.each(begin, end, [&](size_t i, int64_t panel) {
            const Work& one = all[i];
            const int64_t first = panel * kRows, rows = std::min(kRows, one.inner() - first);
            one.gate.times(one.expert->gate, first, rows, gate);
            (one.up ? *one.up : one.gate).times(one.expert->up, first, rows, up);
            for (int64_t t = 0; t < one.count; ++t) {
                own.swiglu(gate + t * kRows, up + t * kRows, rows);
                std::memcpy(one.middle + t * one.inner() + first, gate + t * kRows, sizeof(float) * rows);
            }
        });
    });
    parallel(downs.count(), 1, [&](int64_t begin, int64_t end, int) {
        downs.each(begin, end, [&](size_t i, int64_t item) {
            const Work& one = all[i];
            one.down.fill(item, [&](int64_t t) { return one.middle + t * one.inner(); });
        });
    });
    parallel((hidden + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end, int) {
        float* out = scratch<kOwnTile>(most * kRows);
        for (int64_t panel = begin; panel < end; ++panel) {
            const int64_t first = panel * kRows, rows = std::min(kRows, hidden - first);
            for (const Work& one : all) {
                one.down.times(one.expert->down, first, rows, out);
                for (int64_t t = 0; t < one.count; ++t) take(one.uses[t], first, rows, out + t * kRows);
            }
        }
    });
}

template <typename Take>
void apply(const std::vector<ExpertUses>& experts, const float* x, int64_t tokens, int64_t hidden, Activations type,
           const Take& take) {
    if (experts.empty()) return;
    if (tokens == 1) return apply_to_one(experts, x, hidden, take);
    const auto is_few = [](const ExpertUses& one) { return one.uses.size() <= kFewTokens; };
    if (tokens <= kFewTokens && std::all_of(experts.begin(), experts.end(), is_few)) { // a choice may occur twice
        for (const ExpertUses& one : experts) apply_to_few(one, x, hidden, take);
        return;
    }
    std::vector<Work> together;
    int64_t memory = 0;
    for (const ExpertUses& one : experts) {
        const Parts parts(static_cast<int64_t>(one.uses.size()), kTokensAtOnce);
        for (int64_t i = 0; i < parts.parts; ++i) {
            Work next(one.expert, one.uses.data() + parts.begin(i), parts.size(i), type);
            if (!together.empty() && memory + next.size() > kMostArranged) {
                apply_together(together, x, hidden, take);
                together.clear(), memory = 0;
            }
            memory += next.size();
            together.push_back(std::move(next));
        }
    }
    apply_together(together, x, hidden, take);
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

} // namespace flashmoe
