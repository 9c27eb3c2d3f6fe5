// Every operation of the extension for CPUs, called by several threads at once, on every instruction set, compared with
// the results of a single thread, and those with portable code; for sanitizers (.ci/sanitize) and emulators. Buffers have exactly the required length.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "operators.hpp"
#include "pool.hpp"

using namespace flashmoe;

namespace {

struct Weights {
    std::vector<uint8_t> codes;
    std::vector<float> scales;
    Matrix matrix;

    Weights(std::mt19937& random, int64_t rows, int64_t columns, int bits, int group) {
        std::normal_distribution<float> normal(0.0f, 0.05f);
        codes.resize(rows * columns * bits / 8);
        scales.resize(rows * columns / group);
        for (auto& code : codes) code = static_cast<uint8_t>(random());
        for (auto& scale : scales) scale = normal(random);
        const auto* bytes = reinterpret_cast<const uint8_t*>(scales.data());
        matrix = {codes.data(), bytes, bytes, rows, columns, bits, group, Scale::f32};
    }
};

std::vector<float> noise(std::mt19937& random, int64_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (auto& value : values) value = normal(random);
    return values;
}

using Blocks = std::vector<std::vector<float>>;

// Return the results of all operations on inputs drawn from `seed`, a block for each operation.
Blocks results(int seed) {
    const Activations rounded = static_cast<Activations>(seed % 3);
    const Activations type = has_activations(rounded) ? rounded : Activations::f32;
    std::mt19937 random(seed);
    Blocks all;
    const int widths[] = {2, 3, 4, 8}, groups[] = {32, 64, 128};
    const int bits = widths[seed % 4], group = groups[seed / 4 % 3];
    for (int64_t tokens : {1, 3, 19, 70}) {
        const int64_t hidden = 3 * group, inner = 2 * group;
        const auto x = noise(random, tokens * hidden);
        Weights gate(random, inner, hidden, bits, group), up(random, inner, hidden, bits, group);
        Weights down(random, hidden, inner, bits, group);
        std::vector<float> y(tokens * inner), other(tokens * inner), normed(tokens * inner);
        for (bool add : {false, true})
            quantized_products({{gate.matrix, y.data()}, {up.matrix, other.data()}}, x.data(), tokens, add, type);
        rms_norm(y.data(), other.data(), tokens, inner, 1e-6f, normed.data());
        all.push_back(y);
        all.push_back(other);
        all.push_back(normed);

        std::vector<ExpertUses> experts(3, {{gate.matrix, up.matrix, down.matrix}, {}});
        for (auto& expert : experts)
            for (int64_t t = 0; t < tokens; ++t) expert.uses.push_back({t, 0.5f});
        y.assign(tokens * hidden, 0.0f);
        apply_experts(experts, x.data(), tokens, hidden, y.data(), type);
        all.push_back(y);
        if (tokens <= kFewTokens) {
            std::vector<float> outputs(3 * tokens * hidden), halves(3 * tokens, 0.5f);
            for (int64_t i = 2; i >= 0; --i) {
                for (auto& use : experts[i].uses) use.choice = i;
                expert_outputs({experts[i]}, x.data(), tokens, hidden, 3, outputs.data());
            }
            y.assign(tokens * hidden, 0.0f);
            add_outputs(outputs.data(), halves.data(), tokens, 3, hidden, y.data());
            all.push_back(y);
        }

        const DeltaShape shape{2, 4, 32, 16, 4};
        const auto qkv = noise(random, tokens * shape.channels()), z = noise(random, tokens * shape.value_width());
        const auto b = noise(random, tokens * 4), a = noise(random, tokens * 4);
        const auto convolution = noise(random, shape.channels() * 4), rates = noise(random, 4), norm = noise(random, 16);
        auto conv_state = noise(random, 3 * shape.channels()), recurrent_state = noise(random, 4 * 16 * 32);
        y.assign(tokens * shape.value_width(), 0.0f);
        const DeltaLayer layer{shape, convolution.data(), rates.data(), rates.data(), norm.data(), 1e-6f};
        gated_delta_net(layer, qkv.data(), z.data(), b.data(), a.data(), {{tokens, conv_state.data(), recurrent_state.data()}}, y.data());
        all.push_back(y);
        all.push_back(recurrent_state);

        const int64_t start = 150;
        const AttentionShape heads{6, 2, 32, 8};
        const int64_t capacity = start + tokens;
        const auto q = noise(random, tokens * 6 * 64), k = noise(random, tokens * 64), v = noise(random, tokens * 64);
        const auto norms = noise(random, 32);
        const double frequencies[4] = {1.0, 0.02, 3e-4, 6e-6};
        for (int row_bits : {32, 16, 8, 4}) {
            const RowFormat rows{row_bits, 32, 32};
            // Zeros in every format; bytes of noise could be infinite scales.
            std::vector<uint8_t> keys(2 * capacity * rows.row_bytes()), values(2 * capacity * rows.row_bytes());
            y.assign(tokens * 6 * 32, 0.0f);
            const AttentionLayer attention{heads, rows, frequencies, 1e-6f, true, norms.data(), norms.data()};
            gated_attention(attention, q.data(), k.data(), v.data(), {{tokens, start, capacity, keys.data(), values.data()}}, y.data());
            all.push_back(y);
        }
    }
    return all;
}

// Return the results of all seeds by a single thread.
std::vector<Blocks> by_one_thread() {
    set_threads(1);
    std::vector<Blocks> all;
    for (int seed = 0; seed < 12; ++seed) all.push_back(results(seed));
    return all;
}

// End the program if results differ by more than `tolerance`. Where the terms of a sum cancel each other, an element may
// also differ by the rounding errors of its terms, which are as large as other elements of the block.
void compare(const Blocks& found, const Blocks& expected, float tolerance, const char* name, int seed) {
    for (size_t block = 0; block < found.size(); ++block) {
        float largest = 0.0f;
        for (float value : expected[block]) largest = std::fmax(largest, std::fabs(value));
        for (size_t i = 0; i < found[block].size(); ++i) {
            const float value = expected[block][i], difference = std::fabs(found[block][i] - value);
            if (difference <= tolerance * (1.0f + std::fabs(value)) || difference <= 4e-6f * largest) continue;
            std::printf("%s, seed %d, block %zu: element %zu differs by %g from %g; the largest is %g\n", name, seed, block,
                        i, difference, value, largest);
            std::exit(1);
        }
    }
}

// Multiply vectors in bf16 as floats, if this machine has another way too. An input of a second product may then be rounded
// to the neighbor of the value in another instruction set, so results are compared with those of a single thread only.
bool multiply_bf16_as_floats(const char* name) {
    if (!has_activations(Activations::bf16)) return false;
    for (int bits : {2, 3, 4, 8})
        for (int group : {32, 64, 128}) choose_for_products(kFewTokens + 1, Activations::bf16, bits, group, name);
    return true;
}

} // namespace

int main() {
    choose_operations("portable");
    const auto portable = by_one_thread();
    for (const char* name : {"avx512_vnni", "avx512", "avx2", "neon", "portable"}) {
        if (!choose_operations(name)) continue;
        auto expected = by_one_thread();
        for (int seed = 0; seed < 12; ++seed) compare(expected[seed], portable[seed], 2e-3f, name, seed);
        if (multiply_bf16_as_floats(name)) expected = by_one_thread();
        set_threads(3);
        std::vector<std::thread> callers;
        for (int caller = 0; caller < 4; ++caller)
            callers.emplace_back([&, caller] {
                for (int round = 0; round < 12; ++round) {
                    const int seed = (round + 3 * caller) % 12;
                    compare(results(seed), expected[seed], 1e-4f, name, seed);
                }
            });
        for (auto& caller : callers) caller.join();
        std::printf("%s: all the same\n", name);
    }
    set_threads(1);
    return 0;
}
