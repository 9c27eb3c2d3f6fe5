// Include standard headers before setting the target: the linker may merge their functions into code for any machine.
#include <cmath>
#include <cstring>

#include "operations.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace flashmoe {
namespace {
const char* const kName = "avx2";
#include "lanes_avx2.hpp"
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
const Operations* avx2_operations() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
               ? &operations
               : nullptr;
}
} // namespace flashmoe
#else
namespace flashmoe {
const Operations* avx2_operations() { return nullptr; }
} // namespace flashmoe
#endif
