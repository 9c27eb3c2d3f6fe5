// Rows of a KV cache. `body.hpp` includes this file.

INLINE float from_brain(uint16_t half) {
    const uint32_t bits = uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Round to bf16, half to even.
INLINE uint16_t to_brain(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <int BITS>
INLINE void store_codes(const float* x, const RowFormat& rows, uint8_t* to) {
    constexpr float most = (1 << BITS) - 1;
    uint8_t* ends = to + rows.code_bytes();
    for (int64_t first = 0; first < rows.dim; first += rows.group) {
        const float* own = x + first;
        F low = load(own), high = low;
        for (int64_t i = kLanes; i < rows.group; i += kLanes)
            low = smaller(low, load(own + i)), high = larger(high, load(own + i));
        const uint16_t bias = to_brain(-largest(zero() - low));
        const float least = from_brain(bias);
        const uint16_t scale = to_brain((largest(high) - least) / most);
        const F step = splat(std::fmax(from_brain(scale), 1e-30f));
        for (int64_t i = 0; i < rows.group; i += kLanes) {
            float codes[kLanes];
            store(codes, smaller(splat(most), larger(zero(), rounded((load(own + i) - splat(least)) / step))));
            for (int c = 0; c < kLanes; c += 8 / BITS) {
                const uint8_t code = static_cast<uint8_t>(codes[c]);
                *to++ = BITS == 8 ? code : static_cast<uint8_t>(code | static_cast<uint8_t>(codes[c + 1]) << 4);
            }
        }
        std::memcpy(ends, &scale, 2);
        std::memcpy(ends + 2, &bias, 2);
        ends += 4;
    }
}

void store_row(const float* x, const RowFormat& rows, uint8_t* to) {
    if (rows.bits == 8) return store_codes<8>(x, rows, to);
    if (rows.bits == 4) return store_codes<4>(x, rows, to);
    if (rows.bits == 32) {
        std::memcpy(to, x, sizeof(float) * rows.dim);
        return;
    }
    for (int64_t i = 0; i < rows.dim; ++i) {
        const uint16_t half = to_brain(x[i]);
        std::memcpy(to + 2 * i, &half, 2);
    }
}

template <int BITS>
INLINE void load_codes_of_row(const RowFormat& rows, const uint8_t* from, float* to) {
    const uint8_t* ends = from + rows.code_bytes();
    for (int64_t first = 0; first < rows.dim; first += rows.group, ends += 4) {
        uint16_t halves[2];
        std::memcpy(halves, ends, 4);
        const F scale = splat(from_brain(halves[0])), bias = splat(from_brain(halves[1]));
        for (int64_t i = first; i < first + rows.group; i += kLanes)
            store(to + i, fma(sixteen_codes<BITS>(from + i * BITS / 8), scale, bias));
    }
}

// Return rows [begin, begin + count) in f32: in place, or in `buffer` [count][dim].
INLINE const float* load_rows(const RowFormat& rows, const uint8_t* all, int64_t begin, int64_t count, float* buffer) {
    const uint8_t* from = all + begin * rows.row_bytes();
    if (rows.bits == 32) return reinterpret_cast<const float*>(from);
    for (int64_t n = 0; n < count; ++n, from += rows.row_bytes()) {
        float* to = buffer + n * rows.dim;
        if (rows.bits == 8)
            load_codes_of_row<8>(rows, from, to);
        else if (rows.bits == 4)
            load_codes_of_row<4>(rows, from, to);
        else
            for (int64_t i = 0; i < rows.dim; i += kLanes) store(to + i, load_scales<Scale::bf16>(from + 2 * i));
    }
    return buffer;
}
