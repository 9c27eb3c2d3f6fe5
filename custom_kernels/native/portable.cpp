#include <cmath>
#include <cstring>

#include "operations.hpp"

namespace flashmoe {
namespace {
const char* const kName = "portable";
#include "lanes_portable.hpp"
#include "formats.hpp"
#include "dot_floats.hpp"
#include "dot.hpp"
#include "panel.hpp"
#include "matmul_floats.hpp"
#include "matmul_bytes.hpp"
#include "body.hpp"
} // namespace

const Operations* portable_operations() { return &operations; }
} // namespace flashmoe
