#include <algorithm>
#include <vector>

#include "inputs.hpp"

namespace flashmoe {
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

// Return the number of vectors that share an unpacked panel: less than kTokensAtOnce where threads have too few panels.
int64_t vectors_of_piece(int64_t panels, int64_t count, int64_t block) {
    const int64_t parts = std::max(Parts(count, kTokensAtOnce).parts, (4 * threads() + panels - 1) / panels);
    return std::max((count + parts - 1) / parts, std::min(kTokensAtOnce, 2 * block));
}

// Compute all products of more than kFewTokens vectors in two loops.
void multiply_many(const std::vector<Product>& products, const float* x, int64_t count, int64_t first, bool add,
                   Activations type) {
    const size_t matrices = products.size();
    int64_t memory = 0, panels = 0;
    for (const Product& one : products) {
        memory += Arranged::size(multiplication(one.matrix, type), one.matrix, count);
        panels += (one.matrix.rows + kRows - 1) / kRows;
    }
    float* free = scratch<kArranged>(memory);
    std::vector<Arranged> inputs; // of different formats
    std::vector<size_t> input_of(matrices);
    Joined blocks, items;
    for (size_t i = 0; i < matrices; ++i) {
        const Matrix& m = products[i].matrix;
        const Multiplication& how = multiplication(m, type);
        size_t same = 0;
        while (same < i && !same_format(m, products[same].matrix)) ++same;
        if (same == i) {
            inputs.emplace_back(how, m, count, vectors_of_piece(panels, count, how.block), free);
            free += Arranged::size(how, m, count);
            blocks.add(inputs.back().blocks());
        }
        input_of[i] = same == i ? inputs.size() - 1 : input_of[same];
        items.add((m.rows + kRows - 1) / kRows * inputs[input_of[i]].pieces().parts);
    }
    parallel(blocks.count(), 1, [&](int64_t begin, int64_t end, int) {
        blocks.each(begin, end, [&](size_t i, int64_t block) {
            inputs[i].fill(block, [&](int64_t t) { return x + t * products[0].matrix.columns; });
        });
    });
    parallel(items.count(), 1, [&](int64_t begin, int64_t end, int) {
        items.each(begin, end, [&](size_t i, int64_t item) {
            const Matrix& m = products[i].matrix;
            const Arranged& input = inputs[input_of[i]];
            const int64_t panel_count = (m.rows + kRows - 1) / kRows, piece = item / panel_count;
            const int64_t row = item % panel_count * kRows, rows = std::min(kRows, m.rows - row);
            const int64_t start = input.pieces().begin(piece), vectors = input.pieces().size(piece);
            float* tile = scratch<kOwnTile>(vectors * kRows);
            input.times(m, row, rows, piece, tile);
            for (int64_t t = 0; t < vectors; ++t) {
                float* out = products[i].y + (first + start + t) * m.rows + row;
                for (int64_t r = 0; r < rows; ++r) out[r] = (add ? out[r] : 0.0f) + tile[t * kRows + r];
            }
        });
    });
}

// Return the most vectors whose arranged form fits into kMostArranged, at least kTokensAtOnce.
int64_t most_arranged(const std::vector<Product>& products, Activations type) {
    int64_t floats = 1;
    for (const Product& one : products)
        floats = std::max(floats, Arranged::size(multiplication(one.matrix, type), one.matrix, 1));
    return std::max(kTokensAtOnce, kMostArranged / floats);
}

} // namespace

void quantized_products(const std::vector<Product>& products, const float* x, int64_t tokens, bool add,
                        Activations type) {
    if (products.empty()) return;
    const int64_t columns = products[0].matrix.columns;
    const Parts parts(tokens, most_arranged(products, type));
    for (int64_t i = 0; i < parts.parts; ++i) {
        const int64_t first = parts.begin(i), count = parts.size(i);
        if (count <= kFewTokens)
            multiply_few(products, x + first * columns, count, first, add);
        else
            multiply_many(products, x + first * columns, count, first, add, type);
    }
}

} // namespace flashmoe
