// Rows of a matrix times a few vectors, by the functions of `dot_floats.hpp` or `dot_bytes.hpp`.

template <int BITS, int GROUP, int TOKENS>
void dot_rows(const Matrix& m, int64_t begin, int64_t end, const Vector* x, float* const* out) {
    constexpr int64_t block_bytes = int64_t{16} * GROUP * BITS / 8;
    const int size = static_cast<int>(m.scale_bytes());
    const int64_t groups = m.groups(), blocks = groups / 16, scales_ahead = kAhead / block_bytes * 16 * size;
    const int rest = static_cast<int>(groups % 16);
    Tail tail;
    F total[TOKENS];
    const auto add = [&](const uint8_t* codes, const uint8_t* scales, const uint8_t* biases, int64_t b, int chunks) {
        add_block<BITS, GROUP, TOKENS>(codes, any_scales(scales, m.type), x, b, chunks, total);
        F bias = any_scales(biases, m.type);
        for (int t = 0; t < TOKENS; ++t) total[t] = fma(bias, load(x[t].sums + 16 * b), total[t]);
    };
    for (int64_t row = begin; row < end; ++row) {
        const uint8_t* codes = m.codes + row * m.row_bytes();
        const uint8_t* scales = m.scales + row * m.scale_row_bytes();
        const uint8_t* biases = m.biases + row * m.scale_row_bytes();
        for (int t = 0; t < TOKENS; ++t) total[t] = zero();
        for (int64_t b = 0; b < blocks; ++b) {
            prefetch(scales + scales_ahead), prefetch(biases + scales_ahead);
            add(codes, scales, biases, b, kPerGroup<BITS, GROUP>);
            codes += block_bytes, scales += 16 * size, biases += 16 * size;
        }
        if (rest) {
            read_tail<BITS, GROUP>(codes, scales, biases, rest, size, tail);
            add(tail.codes, tail.scales, tail.biases, blocks, tail.chunks);
        }
        for (int t = 0; t < TOKENS; ++t) out[t][row - begin] = sum(total[t]);
    }
}

template <int BITS, int GROUP>
void dot_typed(const Matrix& m, int64_t begin, int64_t end, int tokens, const Vector* x, float* const* out) {
    int t = 0;
    if constexpr (kTokens >= 4)
        for (; t + 4 <= tokens; t += 4) dot_rows<BITS, GROUP, 4>(m, begin, end, x + t, out + t);
    if constexpr (kTokens >= 2)
        for (; t + 2 <= tokens; t += 2) dot_rows<BITS, GROUP, 2>(m, begin, end, x + t, out + t);
    for (; t < tokens; ++t) dot_rows<BITS, GROUP, 1>(m, begin, end, x + t, out + t);
}

void dot(const Matrix& m, int64_t begin, int64_t end, int tokens, const uint8_t* const* vectors, float* const* out) {
    Vector x[kMostTokens];
    for (int t = 0; t < tokens; ++t) x[t] = Vector(vectors[t], m.columns, m.group);
    FOR_FORMAT(dot_typed, begin, end, tokens, x, out)
}
