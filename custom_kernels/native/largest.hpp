// The choice of the largest values of a row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "pool.hpp"

namespace flashmoe {

// Store the indices of the `count` largest of the first `lengths[row]` values of each row; count <= lengths[row]. NaN counts as the
// largest value.
//
// Among equal values, the choice of torch's `topk` on CPUs depends on its calls of the standard library. This function
// makes the same calls. Source: aten/src/ATen/native/TopKImpl.h.
inline void largest(const float* values, const int32_t* lengths, int64_t rows, int64_t columns, int64_t count,
                    int32_t* indices) {
    using Element = std::pair<double, int64_t>;
    const auto before = [](const Element& a, const Element& b) {
        return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
    };
    parallel(rows, 1, [&](int64_t begin, int64_t end, int) {
        std::vector<Element> all;
        for (int64_t row = begin; row < end; ++row) {
            all.clear();
            for (int64_t i = 0; i < lengths[row]; ++i) all.emplace_back(values[row * columns + i], i);
            if (count * 64 <= lengths[row])
                std::partial_sort(all.begin(), all.begin() + count, all.end(), before);
            else
                std::nth_element(all.begin(), all.begin() + count - 1, all.end(), before);
            for (int64_t i = 0; i < count; ++i) indices[row * count + i] = static_cast<int32_t>(all[i].second);
        }
    });
}

} // namespace flashmoe
