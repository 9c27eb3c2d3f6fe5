// Include standard headers before setting the target: the linker may merge their functions into code for any machine.
#include <cmath>
#include <cstring>

#include "operations.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif

namespace flashmoe {
namespace {
#include "lanes_avx512.hpp"
#include "formats.hpp"
#include "panel.hpp"
#include "matmul_bf16.hpp"

const Multiplication multiplication = {kBf16Block,   kPanelRows,   3,            bf16_vector_bytes,
                                       arrange_bf16, panel_floats, multiply_bf16};
} // namespace
} // namespace flashmoe

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace flashmoe {
const Multiplication* avx512_bf16() {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? &multiplication
               : nullptr;
}
} // namespace flashmoe
#else
namespace flashmoe {
const Multiplication* avx512_bf16() { return nullptr; }
} // namespace flashmoe
#endif
