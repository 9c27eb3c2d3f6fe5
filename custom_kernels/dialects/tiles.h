// Tiles of bf16 in shared memory for NVIDIA's tensor cores.
//
// A tile has rows of DIM values. Eight neighbouring values are a chunk, the 16 bytes that one copy or one row of an
// ldmatrix takes; chunk c of row r lies at c ^ (r % 8), so that eight rows at one chunk are in different banks.

template <int DIM>
inline int chunk_of(int row, int chunk) {
  return row * (DIM / 8) + (chunk ^ (row & 7));
}

// Begins to copy 16 bytes from global into shared memory; with `there` false, zeros, and nothing is read.
inline void begin_copy(uint4* to, const void* from, bool there = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
// Begins to copy a tile of ROWS rows that lie one after another, by THREADS threads of which this is number `mine`.
template <int DIM, int ROWS, int THREADS, typename T>
inline void begin_tile(uint4* to, const T* from, int mine) {
  static_assert(THREADS % DIM == 0, "every thread keeps its chunk and its row modulo 8");
  to += chunk_of<DIM>(mine / (DIM / 8), mine % (DIM / 8));
#pragma unroll
  for (int i = 0; i < ROWS * DIM / 8; i += THREADS) {
    begin_copy(to + i, from + (i + mine) * 8);
  }
}
// The same of a tile of which the first `there` rows exist; others become zeros. Row `left_out` is not touched.
template <int DIM, int ROWS, int THREADS, typename T>
inline void begin_partial_tile(uint4* to, const T* from, int mine, int there, int left_out) {
  to += chunk_of<DIM>(mine / (DIM / 8), mine % (DIM / 8));
#pragma unroll
  for (int i = 0; i < ROWS * DIM / 8; i += THREADS) {
    const int row = (i + mine) / (DIM / 8);
    if (row != left_out) {
      begin_copy(to + i, from + (i + mine) * 8, row < there);
    }
  }
}
// Closes a batch of copies; may be empty.
inline void end_batch() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until of this thread's batches at most LATER have not arrived.
template <int LATER>
inline void wait_for_batches() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}

// Four 8x8 tiles; lane l gives the address of row l % 8 of tile l / 8.
inline void load_tiles(uint* tiles, const uint4* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
               : "r"(shared_address(row))
               : "memory");
}
inline void load_transposed(uint* tiles, const uint4* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
               : "r"(shared_address(row))
               : "memory");
}

inline float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
