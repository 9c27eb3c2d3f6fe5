// Products of a few vectors in floats: codes become floats lane by lane, a chunk at a time; `pack` puts a vector into
// the same order once. Included after `formats.hpp` and before `dot.hpp`.

struct Vector {
    const float *packed, *sums;

    Vector() = default;
    Vector(const uint8_t* from, int64_t columns, int group)
        : packed(reinterpret_cast<const float*>(from)), sums(packed + packed_length(columns, group)) {}
};

void pack(const float* x, int64_t columns, int bits, int group, float* packed) {
    const int per_lane = codes_per_lane(bits), chunk = 16 * per_lane;
    const int64_t length = packed_length(columns, group);
    int64_t c = 0;
    for (; (c + 1) * chunk <= columns; ++c)
        for (int j = 0; j < per_lane; ++j)
            store(packed + c * chunk + 16 * j, gather(x + c * chunk + j, per_lane));
    for (; c * chunk < length; ++c)
        for (int j = 0; j < per_lane; ++j)
            for (int i = 0; i < 16; ++i) {
                int64_t at = c * chunk + int64_t{i} * per_lane + j;
                packed[c * chunk + 16 * j + i] = at < columns ? x[at] : 0.0f;
            }
}

int64_t vector_bytes(int64_t columns, int group) {
    return 4 * (packed_length(columns, group) + packed_sums(columns, group));
}

void prepare(const float* x, int64_t columns, int bits, int group, uint8_t* to) {
    float* packed = reinterpret_cast<float*>(to);
    pack(x, columns, bits, group, packed);
    add_up_groups(x, columns, group, packed + packed_length(columns, group));
}

template <int BITS, int J, int TOKENS>
struct Codes {
    static INLINE void add(W w, const Vector* x, int64_t at, F* part) {
        F q = value<BITS, J>(w);
        for (int t = 0; t < TOKENS; ++t)
            part[t] = J ? fma(q, load(x[t].packed + at + 16 * J), part[t]) : q * load(x[t].packed + at);
        if constexpr (J + 1 < codes_per_lane(BITS)) Codes<BITS, J + 1, TOKENS>::add(w, x, at, part);
    }
};

constexpr int kRowsAtOnce = 1; // the result of a row does not depend on it

// Add the first `chunks` chunks of block `b`.
template <int BITS, int GROUP, int ROWS, int TOKENS>
INLINE void add_block(const uint8_t* const* codes, const F* scales, const Vector* x, int64_t b, int chunks,
                      F (*total)[TOKENS]) {
    for (int c = 0; c < chunks; ++c)
        for (int r = 0; r < ROWS; ++r) {
            W w = load_codes<BITS>(codes[r] + c * kChunkBytes<BITS>);
            prefetch(codes[r] + c * kChunkBytes<BITS> + kAhead);
            F part[TOKENS];
            Codes<BITS, 0, TOKENS>::add(w, x, b * 16 * GROUP + c * kChunk<BITS>, part);
            F s = spread<kPerGroup<BITS, GROUP>>(scales[r], c);
            for (int t = 0; t < TOKENS; ++t) total[r][t] = fma(part[t], s, total[r][t]);
        }
}
