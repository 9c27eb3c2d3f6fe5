#include <cmath>
#include <cstring>

#include "operations.hpp"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace flashmoe {
namespace {
const char* const kName = "neon";
#include "lanes_neon.hpp"
#include "formats.hpp"
#include "dot_floats.hpp"
#include "dot.hpp"
#include "panel.hpp"
#include "matmul_floats.hpp"
#include "matmul_bytes.hpp"
#include "body.hpp"
} // namespace

const Operations* neon_operations() { return &operations; }
} // namespace flashmoe
#else
namespace flashmoe {
const Operations* neon_operations() { return nullptr; }
} // namespace flashmoe
#endif
