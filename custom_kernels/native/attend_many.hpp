// Attention of many tokens: scores and sums of values are products of many vectors, a block of queries times a tile of
// keys. No more than a tile of the scores exists at a time. `body.hpp` includes this file.
//
// Tiles begin at multiples of kTileKeys, so results do not depend on the number of tokens in a call.

constexpr int64_t kTileKeys = 64;
constexpr int64_t kBlockQueries = 128; // about as many queries share a tile

INLINE int64_t tokens_of_block(int64_t heads) { return heads < kBlockQueries ? kBlockQueries / heads : 1; }

INLINE int64_t panels_of(int64_t count) { return (count + kPanelRows - 1) / kPanelRows; }

int64_t attend_many_floats(int64_t heads, int64_t dim) {
    const int64_t queries = tokens_of_block(heads) * heads;
    return queries * (dim + 2 * kTileKeys + panels_of(dim) * kPanelRows + 2) + kTileKeys * dim +
           (panels_of(kTileKeys) * dim + panels_of(dim) * kTileKeys) * kPanelRows;
}

// Multiply a panel of `columns` by all queries, arranged in `blocks`, and add the results to tile[query][kPanelRows].
INLINE void add_queries(const Parts& blocks, const float* panel, int64_t columns, const float* arranged, float* tile) {
    for (int64_t i = 0; i < blocks.parts; ++i) {
        const int64_t first = blocks.begin(i);
        add_block_of_floats<kFloatBlock>(static_cast<int>(blocks.size(i)), panel, columns, arranged + first * columns,
                                         tile + first * kPanelRows);
    }
}

// Store `count` keys as panels [dim][kPanelRows], with zeros for further keys.
INLINE void fill_keys(const float* keys, int64_t dim, int64_t count, float* panels) {
    for (int64_t n = 0; n < panels_of(kTileKeys) * kPanelRows; n += 16)
        for (int64_t i = 0; i < dim; i += 16) {
            W words[16];
            for (int r = 0; r < 16; ++r)
                words[r] = n + r < count ? load_words(reinterpret_cast<const uint32_t*>(keys + (n + r) * dim + i))
                                         : splat_word(0);
            transpose(words);
            float* to = panels + (n / kPanelRows * dim + i) * kPanelRows + n % kPanelRows;
            for (int c = 0; c < 16; ++c) store_words(reinterpret_cast<uint32_t*>(to + c * kPanelRows), words[c]);
        }
}

// Store `count` values as panels [key][kPanelRows], with zeros beyond the last key and the last dimension.
INLINE void fill_values(const float* values, int64_t dim, int64_t count, float* panels) {
    for (int64_t p = 0; p < panels_of(dim); ++p)
        for (int64_t n = 0; n < kTileKeys; ++n)
            for (int64_t i = 0; i < kPanelRows; i += 16) {
                const int64_t at = p * kPanelRows + i;
                store(panels + (p * kTileKeys + n) * kPanelRows + i,
                      n < count && at < dim ? load(values + n * dim + at) : zero());
            }
}

// Replace a query's scores of a tile, of which it sees the first `seen`, by weights. `peak` is its largest score so far
// and the sum of its weights. Return the factor of its earlier sums.
INLINE float weigh(float* scores, int64_t seen, float scale, float* peak) {
    for (int64_t i = 0; i < kTileKeys; i += kLanes) store(scores + i, load(scores + i) * splat(scale));
    for (int64_t i = seen; i < kTileKeys; ++i) scores[i] = -INFINITY;
    F most = load(scores);
    for (int64_t i = kLanes; i < kTileKeys; i += kLanes) most = larger(most, load(scores + i));
    const float previous = peak[0], now = std::fmax(previous, largest(most));
    const float factor = now > previous ? std::exp(previous - now) : 1.0f;
    for (int64_t i = 0; i < kTileKeys; i += kLanes) store(scores + i, exponential(load(scores + i) - splat(now)));
    for (int64_t i = seen; i < kTileKeys; ++i) scores[i] = 0.0f;
    F total = load(scores);
    for (int64_t i = kLanes; i < kTileKeys; i += kLanes) total = total + load(scores + i);
    peak[0] = now, peak[1] = peak[1] * factor + sum(total);
    return factor;
}

void attend_many(const float* queries, int64_t stride, int64_t tokens, int64_t heads, const RowFormat& rows,
                 const uint8_t* keys, const uint8_t* values, int64_t seen, float* y, float* scratch) {
    const int64_t dim = rows.dim;
    float* widened = scratch;
    scratch += kTileKeys * dim;
    const int64_t count = tokens * heads, width = panels_of(dim) * kPanelRows;
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    const Parts blocks(count, kFloatBlock);
    float *arranged = scratch, *sums = arranged + count * dim, *peaks = sums + count * width;
    float *scores = peaks + 2 * count, *weights = scores + count * kTileKeys;
    float *key_panels = weights + count * kTileKeys;
    float *value_panels = key_panels + panels_of(kTileKeys) * kPanelRows * dim;
    const auto query = [&](int64_t i) { return queries + i / heads * stride + i % heads * dim; };
    for (int64_t i = 0; i < blocks.parts; ++i) {
        const float* own[kFloatBlock];
        for (int64_t q = 0; q < blocks.size(i); ++q) own[q] = query(blocks.begin(i) + q);
        arrange_floats(own, static_cast<int>(blocks.size(i)), dim, 0, 0,
                       reinterpret_cast<uint8_t*>(arranged + blocks.begin(i) * dim));
    }
    std::memset(sums, 0, sizeof(float) * count * width);
    for (int64_t i = 0; i < count; ++i) peaks[2 * i] = -INFINITY, peaks[2 * i + 1] = 0.0f;
    const int64_t end = seen + tokens - 1;
    for (int64_t n = 0; n < end; n += kTileKeys) {
        const int64_t held = end - n < kTileKeys ? end - n : kTileKeys;
        fill_keys(load_rows(rows, keys, n, held, widened), dim, held, key_panels);
        fill_values(load_rows(rows, values, n, held, widened), dim, held, value_panels);
        std::memset(scores, 0, sizeof(float) * count * kTileKeys);
        for (int64_t p = 0; p < panels_of(kTileKeys); ++p)
            add_queries(blocks, key_panels + p * dim * kPanelRows, dim, arranged, scores + p * count * kPanelRows);
        for (int64_t b = 0; b < blocks.parts; ++b) {
            const int64_t first = blocks.begin(b), size = blocks.size(b);
            for (int64_t q = 0; q < size; ++q) {
                const int64_t i = first + q, limit = seen + i / heads - n;
                alignas(64) float own[kTileKeys] = {};
                if (limit > 0) {
                    for (int64_t k = 0; k < kTileKeys; k += kLanes)
                        store(own + k, load(scores + (k / kPanelRows * count + i) * kPanelRows + k % kPanelRows));
                    const float factor = weigh(own, limit < kTileKeys ? limit : kTileKeys, scale, peaks + 2 * i);
                    if (factor < 1.0f)
                        for (int64_t k = 0; k < width; k += kLanes) {
                            float* at = sums + (k / kPanelRows * count + i) * kPanelRows + k % kPanelRows;
                            store(at, load(at) * splat(factor));
                        }
                }
                for (int64_t k = 0; k < kTileKeys; ++k) weights[first * kTileKeys + k * size + q] = own[k];
            }
        }
        for (int64_t p = 0; p < panels_of(dim); ++p)
            add_queries(blocks, value_panels + p * kTileKeys * kPanelRows, kTileKeys, weights,
                        sums + p * count * kPanelRows);
    }
    for (int64_t i = 0; i < count; ++i)
        for (int64_t k = 0; k < dim; k += kLanes)
            store(y + i / heads * stride + i % heads * dim + k,
                  load(sums + (k / kPanelRows * count + i) * kPanelRows + k % kPanelRows) / splat(peaks[2 * i + 1]));
}
