// Copies of records from the CPU's memory into slots; only for CUDA. Grid: x = any number, y = records.
// Each thread loads 64 bytes before it stores them, because a load over the bus takes long.

const long row_words = slab_shape[1] / 16;
const int64_t* job = reinterpret_cast<const int64_t*>(jobs[0]) + 2 * (first_shape[0] - 1 + blockIdx.y);
const uint4* from = reinterpret_cast<const uint4*>(job[0]);
uint4* to = reinterpret_cast<uint4*>(const_cast<uint8_t*>(slab)) + job[1] * row_words;
const long step = (long)gridDim.x * blockDim.x;
long word = (long)blockIdx.x * blockDim.x + threadIdx.x;
for (; word + 3 * step < row_words; word += 4 * step) {
  const uint4 a = from[word];
  const uint4 b = from[word + step];
  const uint4 c = from[word + 2 * step];
  const uint4 d = from[word + 3 * step];
  to[word] = a;
  to[word + step] = b;
  to[word + 2 * step] = c;
  to[word + 3 * step] = d;
}
for (; word < row_words; word += step) {
  to[word] = from[word];
}
if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
  written[0] = 1;
}
