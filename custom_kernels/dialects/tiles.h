// Tiles of bf16 in shared memory for NVIDIA's tensor cores.
//
// A tile has rows of DIM values. Eight adjacent values are a chunk: the 16 bytes of one copy or of one row of ldmatrix.
// Chunk c of row r is stored at c ^ (r % 8), so that one chunk of eight rows is in eight different banks.

template <int DIM>
inline int chunk_of(int row, int chunk) {
  return row * (DIM / 8) + (chunk ^ (row & 7));
}

// Begin to copy 16 bytes from global to shared memory; if `there` is false, store zeros and read nothing.
inline void begin_copy(uint4* to, const void* from, bool there = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
// Begin to copy a tile of ROWS consecutive rows by THREADS threads; `mine` is the number of this thread.
template <int DIM, int ROWS, int THREADS, typename T>
inline void begin_tile(uint4* to, const T* from, int mine) {
  static_assert(THREADS % DIM == 0, "every thread keeps its chunk and its row modulo 8");
  to += chunk_of<DIM>(mine / (DIM / 8), mine % (DIM / 8));
#pragma unroll
  for (int i = 0; i < ROWS * DIM / 8; i += THREADS) {
    begin_copy(to + i, from + (i + mine) * 8);
  }
}
// Begin to copy a tile whose first `there` rows exist; the other rows become zeros. Leave row `left_out` unchanged.
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
// Close a batch of copies, which may be empty.
inline void end_batch() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Wait until at most LATER of this thread's batches are still in flight.
template <int LATER>
inline void wait_for_batches() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}

// Load four 8x8 tiles; lane l passes the address of row l % 8 of tile l / 8.
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
