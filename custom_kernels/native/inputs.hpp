// Vectors in the order in which products read them, and the memory of threads; for the sources of the operators.
#pragma once

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "operators.hpp"
#include "pool.hpp"

namespace flashmoe {

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

enum Purpose { kPacked, kArranged, kHidden, kHiddenPacked, kMixed, kQueries, kPartial, kOwn, kNarrow, kOwnTile, kOwnUp };

template <Purpose PURPOSE>
float* scratch(int64_t count) {
    thread_local Scratch memory;
    return memory.room(count);
}

constexpr int64_t kBytesAtOnce = 24 * 1024; // bytes of weights per step of a thread, so that all end together
constexpr int64_t kTokensAtOnce = 256;      // tokens for which a panel is unpacked once
constexpr int64_t kRows = 32;               // rows of a matrix that a thread multiplies at once, in whole panels
constexpr int64_t kMostArranged = 1 << 22;  // floats of memory for arranged vectors

inline int64_t rows_at_once(const Matrix& m) {
    const int64_t row = m.row_bytes() + 2 * m.scale_row_bytes();
    return std::max<int64_t>(8, kBytesAtOnce / row / 8 * 8); // whole blocks of rows
}

inline bool same_format(const Matrix& a, const Matrix& b) {
    return a.bits == b.bits && a.group == b.group && a.columns == b.columns;
}

// Return the operations for products of so many vectors of a type with a matrix's format.
const Operations& operations_for(const Matrix& m, int64_t vectors, Activations type = Activations::f32);

// Return the products of more than kFewTokens vectors of a type that `has_activations`.
const Multiplication& multiplication(const Matrix& m, Activations type);

// `count` vectors that are prepared for `dot` with a matrix's format, 1 <= count <= kFewTokens.
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

// Store rows [begin, end) times vectors [0, count), count <= kFewTokens, in to[t * stride + row - begin].
inline void few(const Matrix& m, int64_t begin, int64_t end, const Prepared& x, int64_t count, float* to,
                int64_t stride) {
    const uint8_t* vectors[kMostTokens];
    float* out[kMostTokens];
    for (int64_t first = 0; first < count; first += kMostTokens) {
        const int tokens = static_cast<int>(std::min<int64_t>(kMostTokens, count - first));
        for (int t = 0; t < tokens; ++t) vectors[t] = x.vector(first + t), out[t] = to + (first + t) * stride;
        x.own.dot(m, begin, end, tokens, vectors, out);
    }
}

// Vectors that are arranged for products of many vectors with matrices of a format, in pieces that are multiplied apart.
class Arranged {
public:
    static int64_t size(const Multiplication& how, const Matrix& m, int64_t count) {
        return count * how.vector_bytes(m.columns, m.group) / 4; // floats
    }

    // `most` is the number of vectors of the largest piece.
    Arranged(const Multiplication& how, const Matrix& m, int64_t count, int64_t most, float* memory)
        : how_(how), format_(m), pieces_(count, most), bytes_(how.vector_bytes(m.columns, m.group)),
          memory_(reinterpret_cast<uint8_t*>(memory)) {
        for (int64_t piece = 0; piece < pieces_.parts; ++piece) {
            const Parts blocks(pieces_.size(piece), how.block);
            for (int64_t i = 0; i < blocks.parts; ++i)
                blocks_.push_back({pieces_.begin(piece) + blocks.begin(i), blocks.size(i)});
        }
    }

    const Parts& pieces() const { return pieces_; }
    int64_t blocks() const { return static_cast<int64_t>(blocks_.size()); }

    // Arrange a block; `row(i)` returns vector i.
    template <typename Row>
    void fill(int64_t block, const Row& row) const {
        const auto [first, count] = blocks_[block];
        std::vector<const float*> rows(count);
        for (int64_t t = 0; t < count; ++t) rows[t] = row(first + t);
        how_.arrange(rows.data(), static_cast<int>(count), format_.columns, format_.bits, format_.group,
                     memory_ + first * bytes_);
    }

    // Store the products of a piece with rows [first, first + rows) of `m` in to[t * kRows + row - first], rows <= kRows;
    // rows beyond the end of `m` may be written.
    void times(const Matrix& m, int64_t first, int64_t rows, int64_t piece, float* to) const {
        const int64_t count = pieces_.size(piece);
        const uint8_t* vectors = memory_ + pieces_.begin(piece) * bytes_;
        float* own = scratch<kOwn>(how_.scratch(m));
        if (how_.rows == kRows) return how_.multiply(m, first, count, vectors, to, own);
        float* tile = scratch<kNarrow>(count * how_.rows);
        for (int64_t row = 0; row < rows; row += how_.rows) {
            how_.multiply(m, first + row, count, vectors, tile, own);
            for (int64_t t = 0; t < count; ++t)
                std::memcpy(to + t * kRows + row, tile + t * how_.rows, sizeof(float) * how_.rows);
        }
    }

private:
    struct Block {
        int64_t first, count;
    };

    const Multiplication& how_;
    Matrix format_;
    Parts pieces_;
    int64_t bytes_;
    uint8_t* memory_;
    std::vector<Block> blocks_;
};

// Items of several lists, one list after the other.
class Joined {
public:
    void add(int64_t items) { starts_.push_back(starts_.back() + items); }
    int64_t count() const { return starts_.back(); }

    // Call f(list, item) for items [begin, end) of all lists.
    template <typename Function>
    void each(int64_t begin, int64_t end, const Function& f) const {
        size_t list = std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin() - 1;
        for (int64_t item = begin; item < end; ++item) {
            while (item >= starts_[list + 1]) ++list;
            f(list, item - starts_[list]);
        }
    }

private:
    std::vector<int64_t> starts_{0};
};

} // namespace flashmoe
