// Copies of records into slots, 16 bytes at a time; only for CUDA. Grid: x = any number, y = records.

const long row_words = slab_shape[1] / 16;
const int record = blockIdx.y;
const uint4* from = reinterpret_cast<const uint4*>(records) + record * row_words;
uint4* to = reinterpret_cast<uint4*>(const_cast<uint8_t*>(slab)) + slots[record] * row_words;
for (long word = blockIdx.x * blockDim.x + threadIdx.x; word < row_words; word += (long)gridDim.x * blockDim.x) {
  to[word] = from[word];
}
if (blockIdx.x == 0 && record == 0 && threadIdx.x == 0) {
  written[0] = 1;
}
