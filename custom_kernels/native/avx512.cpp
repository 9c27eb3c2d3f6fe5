// Include standard headers before setting the target: the linker may merge their functions into code for any machine.
#include <cmath>
#include <cstring>

#include "operations.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

namespace flashmoe {
namespace {
const char* const kName = "avx512";
#include "lanes_avx512.hpp"
#include "formats.hpp"
#include "dot_floats.hpp"
#include "dot.hpp"
#include "panel.hpp"
#include "matmul_floats.hpp"
#include "matmul_bytes.hpp"
#include "body.hpp"
} // namespace
} // namespace flashmoe

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace flashmoe {
const Operations* avx512_operations() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? &operations
               : nullptr;
}
} // namespace flashmoe
#else
namespace flashmoe {
const Operations* avx512_operations() { return nullptr; }
} // namespace flashmoe
#endif
