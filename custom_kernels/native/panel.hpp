// Panels of rows for products of many vectors. A panel is unpacked once, with a lane for each row, and multiplied by all
// vectors, block by block. Every result is the sum over the columns in ascending order (of whole groups, for vectors of bytes),
// whatever the number of vectors, so the vectors of a call do not change each other's results.
//
// Included before `matmul_*.hpp`, after a `lanes_*.hpp` and `formats.hpp`.

constexpr int kPanelRows = 16 * kPanelVectors;
constexpr int kPanelWords = 128; // words of 32 bits in a row of a panel: half of a first-level cache
constexpr int kMostWords = 256;  // or a chunk of 2-bit codes, as floats

constexpr int64_t kPanelAhead = kAhead / kPanelRows; // bytes of a row between codes in use and prefetched codes

// Load a chunk of 16 rows, which has code j of lane i of row r in lane r of words[i]. Rows beyond the end repeat the
// last row, and codes beyond the end of a row are zero.
template <int BITS>
INLINE void load_chunk(const Matrix& m, int64_t first, int64_t chunk, W* words) {
    const int64_t at = chunk * kChunkBytes<BITS>, left = m.row_bytes() - at;
    for (int r = 0; r < 16; ++r) {
        const int64_t row = first + r < m.rows ? first + r : m.rows - 1;
        const uint8_t* codes = m.codes + row * m.row_bytes() + at;
        prefetch(codes + kPanelAhead + (left > kPanelAhead ? 0 : (kPanelRows - 1) * m.row_bytes())); // or the next panel
        if (left >= kChunkBytes<BITS>) {
            words[r] = load_codes<BITS>(codes);
            continue;
        }
        uint8_t last[64] = {};
        std::memcpy(last, codes, left);
        words[r] = load_codes<BITS>(last);
    }
    transpose(words);
}

// Store the scales or biases of a panel's rows as floats, [group][kPanelRows].
INLINE void load_factors(const Matrix& m, bool biases, int64_t first, float* to) {
    const uint8_t* from = biases ? m.biases : m.scales;
    const int64_t groups = m.groups(), size = m.scale_bytes();
    for (int v = 0; v < kPanelVectors; ++v)
        for (int64_t g = 0; g < groups; g += 16) {
            const int64_t count = groups - g < 16 ? groups - g : 16;
            alignas(64) float rows[16][16];
            W words[16];
            for (int r = 0; r < 16; ++r) {
                const int64_t row = first + 16 * v + r < m.rows ? first + 16 * v + r : m.rows - 1;
                const uint8_t* own = from + row * m.scale_row_bytes() + g * size;
                uint8_t last[64] = {};
                if (count < 16) std::memcpy(last, own, count * size);
                const uint8_t* whole = count < 16 ? last : own;
                store(rows[r], biases ? any_biases(whole, m.type) : any_scales(whole, m.type));
                words[r] = load_words(reinterpret_cast<const uint32_t*>(rows[r]));
            }
            transpose(words);
            for (int64_t i = 0; i < count; ++i)
                store_words(reinterpret_cast<uint32_t*>(to + (g + i) * kPanelRows + 16 * v), words[i]);
        }
}

// Memory for a panel: scales and biases of all columns, and the codes of some.
struct Panel {
    float *scales, *biases;
    uint32_t* words; // [step][kPanelRows]

    Panel(const Matrix& m, int64_t first, float* scratch)
        : scales(scratch), biases(scratch + m.groups() * kPanelRows),
          words(reinterpret_cast<uint32_t*>(biases + m.groups() * kPanelRows)) {
        load_factors(m, false, first, scales);
        load_factors(m, true, first, biases);
    }
};

int64_t panel_floats(const Matrix& m) { return (2 * m.groups() + kMostWords) * kPanelRows; }

// Return a lane of 3-bit codes as two halves of 16 bits, each with four codes.
INLINE W in_halves(W word) { return (word & splat_word(0xfff)) | shift_left<4>(word & splat_word(0xfff000)); }

#define FOR_BITS(function, ...)                              \
    if (m.type == Scale::e8m0) return function<kFloat4>(m, __VA_ARGS__); \
    switch (m.bits) {                                        \
        case 2: return function<2>(m, __VA_ARGS__);          \
        case 3: return function<3>(m, __VA_ARGS__);          \
        case 4: return function<4>(m, __VA_ARGS__);          \
        default: return function<8>(m, __VA_ARGS__);         \
    }
