// Rows of a matrix times a few vectors, by the functions of `dot_floats.hpp` or `dot_bytes.hpp`.

// Compute rows [begin, end), ROWS at a time, which share each load of the vectors; return the first row left over.
template <int BITS, int GROUP, int ROWS, int TOKENS>
int64_t dot_rows(const Matrix& m, int64_t begin, int64_t end, const Vector* x, float* const* out, int64_t row) {
    constexpr int64_t block_bytes = int64_t{16} * GROUP * width(BITS) / 8;
    const int size = static_cast<int>(m.scale_bytes());
    const int64_t groups = m.groups(), blocks = groups / 16, scales_ahead = kAhead / block_bytes * 16 * size;
    const int rest = static_cast<int>(groups % 16);
    const int64_t row_bytes = m.row_bytes(), scale_row_bytes = m.scale_row_bytes();
    Tail tail[ROWS];
    const uint8_t *codes[ROWS], *scales[ROWS], *biases[ROWS];
    F total[ROWS][TOKENS];
    const auto add = [&](int64_t b, int chunks) __attribute__((always_inline)) {
        F factors[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
            factors[r] = any_scales(scales[r], m.type);
        add_block<BITS, GROUP, ROWS, TOKENS>(codes, factors, x, b, chunks, total);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const F bias = any_biases(biases[r], m.type);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; ++t) total[r][t] = fma(bias, load(x[t].sums + 16 * b), total[r][t]);
        }
    };
    for (; row + ROWS <= end; row += ROWS) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            codes[r] = m.codes + (row + r) * row_bytes;
            scales[r] = m.scales + (row + r) * scale_row_bytes;
            biases[r] = m.biases + (row + r) * scale_row_bytes;
            for (int t = 0; t < TOKENS; ++t) total[r][t] = zero();
        }
        for (int64_t b = 0; b < blocks; ++b) {
            add(b, kPerGroup<BITS, GROUP>);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                prefetch(scales[r] + scales_ahead), prefetch(biases[r] + scales_ahead);
                codes[r] += block_bytes, scales[r] += 16 * size, biases[r] += 16 * size;
            }
        }
        if (rest) {
            for (int r = 0; r < ROWS; ++r) {
                read_tail<BITS, GROUP>(codes[r], scales[r], biases[r], rest, size, tail[r]);
                codes[r] = tail[r].codes, scales[r] = tail[r].scales, biases[r] = tail[r].biases;
            }
            add(blocks, tail[0].chunks);
        }
        for (int r = 0; r < ROWS; ++r)
            for (int t = 0; t < TOKENS; ++t) out[t][row + r - begin] = sum(total[r][t]);
    }
    return row;
}

template <int BITS, int GROUP, int TOKENS>
void dot_all_rows(const Matrix& m, int64_t begin, int64_t end, const Vector* x, float* const* out) {
    int64_t row = begin;
    if constexpr (kRowsAtOnce / TOKENS > 1)
        row = dot_rows<BITS, GROUP, kRowsAtOnce / TOKENS, TOKENS>(m, begin, end, x, out, row);
    dot_rows<BITS, GROUP, 1, TOKENS>(m, begin, end, x, out, row);
}

template <int BITS, int GROUP>
void dot_typed(const Matrix& m, int64_t begin, int64_t end, int tokens, const Vector* x, float* const* out) {
    int t = 0;
    if constexpr (kTokens >= 4)
        for (; t + 4 <= tokens; t += 4) dot_all_rows<BITS, GROUP, 4>(m, begin, end, x + t, out + t);
    if constexpr (kTokens >= 2)
        for (; t + 2 <= tokens; t += 2) dot_all_rows<BITS, GROUP, 2>(m, begin, end, x + t, out + t);
    for (; t < tokens; ++t) dot_all_rows<BITS, GROUP, 1>(m, begin, end, x + t, out + t);
}

void dot(const Matrix& m, int64_t begin, int64_t end, int tokens, const uint8_t* const* vectors, float* const* out) {
    Vector x[kMostTokens];
    for (int t = 0; t < tokens; ++t) x[t] = Vector(vectors[t], m.columns, m.group);
    FOR_FORMAT(dot_typed, begin, end, tokens, x, out)
}
