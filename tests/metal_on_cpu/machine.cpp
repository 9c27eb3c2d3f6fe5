// A machine that runs a Metal kernel on the CPU, one threadgroup after the other, and checks every memory access.
//
// Threads are fibers. Each runs until a barrier or a simdgroup operation, and continues when all other threads
// concerned have arrived there. The kernel is compiled with the instrumentation of -fsanitize=thread, whose functions
// are defined here: `touch` knows all buffers, and the last thread that wrote or read each cell. Two accesses to a cell
// by different threads, one of them a write, are a race unless a barrier with the right flags separates them; nothing
// separates threadgroups. This file is compiled once, without the instrumentation, and linked to every kernel.

#include "metal.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

extern "C" char __start_metal_threadgroup[] __attribute__((weak));
extern "C" char __stop_metal_threadgroup[] __attribute__((weak));

namespace machine {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kCell = 2;  // bytes; no kernel writes single bytes
constexpr uint32_t kNobody = 0, kMany = 0xffffffffu;
constexpr uint32_t kThreadgroupMemory = 32 * 1024;  // Metal's limit

struct Moment {
  uint32_t who = kNobody;  // number of the thread in the grid, plus 1
  uint32_t barriers = 0, simdgroup_barriers = 0;
};
struct Cell {
  Moment write, read;
};
struct Buffer {
  const char* name;
  char* data;
  size_t size;
  bool writable, initialised;
  Cell* cells;
};
enum class Waiting { kNo, kThreadgroup, kSimdgroup, kExchange };
struct Fiber {
  jmp_buf place;  // where it continues
  char* stack;
  Position position;
  Waiting waiting;
  bool finished;
  int site, flags;
  uint32_t simdgroup_barriers[2];  // passed, by kind of memory: device, threadgroup
};
struct Simdgroup {
  uint values[2][32];
  int generation, arrived;
};

static Buffer* buffers;
static int buffer_count;
static Buffer shared;
static Fiber* fibers;
static Simdgroup simdgroups[32];
static int thread_count, current, arrived;
static uint32_t first_number;            // number of the first thread of the running threadgroup
static uint32_t barriers[2];             // passed by the running threadgroup: device, threadgroup memory
static void (*entry)(void**, const Position*);
static void** arguments;
static jmp_buf scheduler, failed;
static char message[512];

[[noreturn]] static void fail(const char* format, ...) {
  const uint3 at = fibers[current].position.thread_position_in_threadgroup;
  const uint3 group = fibers[current].position.threadgroup_position_in_grid;
  va_list list;
  va_start(list, format);
  int length = vsnprintf(message, sizeof message, format, list);
  va_end(list);
  snprintf(message + length, sizeof message - length, " (thread %u,%u,%u of threadgroup %u,%u,%u)", at.x, at.y, at.z,
           group.x, group.y, group.z);
  longjmp(failed, 1);
}

static bool same_threadgroup(const Moment& moment) {
  return moment.who > first_number && moment.who <= first_number + thread_count;
}

// Return whether `moment` is ordered before the current thread's present access.
static bool before(const Moment& moment, int kind) {
  if (moment.who == kNobody) return true;
  if (moment.who == kMany) return moment.barriers < barriers[kind];
  if (moment.who == first_number + current + 1) return true;
  if (!same_threadgroup(moment)) return false;
  if (moment.barriers < barriers[kind]) return true;
  const int other = moment.who - first_number - 1;
  return other / 32 == current / 32 && moment.simdgroup_barriers < fibers[current].simdgroup_barriers[kind];
}

// Memory of the machine that threads read: arguments, positions, values of other lanes.
static bool ours(const char* at) {
  const Position& position = fibers[current].position;
  return (at >= (char*)arguments && at < (char*)(arguments + buffer_count)) ||
         (at >= (char*)&position && at < (char*)(&position + 1)) ||
         (at >= (char*)simdgroups && at < (char*)simdgroups + sizeof simdgroups);
}

static void touch(const void* address, size_t size, bool write, bool aligned) {
  char* at = (char*)address;
  Fiber& fiber = fibers[current];
  if (at >= fiber.stack && at < fiber.stack + kStack) return;
  if (ours(at)) return;
  Buffer* buffer = nullptr;
  if (at >= shared.data && at < shared.data + shared.size) {
    buffer = &shared;
  } else {
    for (int i = 0; i < buffer_count && !buffer; i++) {
      if (at >= buffers[i].data && at < buffers[i].data + buffers[i].size) buffer = &buffers[i];
    }
  }
  const char* what = write ? "write" : "read";
  if (!buffer) {
    for (int i = 0; i < buffer_count; i++) {
      const Buffer& near = buffers[i];
      if (at >= near.data - 4096 && at < near.data + near.size + 4096) {
        fail("out-of-bounds %s of %zu bytes at byte %td of %s, which has %zu", what, size, at - near.data, near.name,
             near.size);
      }
    }
    if (at >= shared.data - 4096 && at < shared.data + shared.size + 4096) {
      fail("out-of-bounds %s of %zu bytes at byte %td of threadgroup memory, which has %zu", what, size,
           at - shared.data, shared.size);
    }
    fail("%s of %zu bytes at an address in no buffer", what, size);
  }
  const size_t offset = at - buffer->data;
  if (offset + size > buffer->size) {
    fail("out-of-bounds %s of %zu bytes at byte %zu of %s, which has %zu", what, size, offset, buffer->name,
         buffer->size);
  }
  if (aligned && (uintptr_t)at % size) fail("misaligned %s of %zu bytes at byte %zu of %s", what, size, offset, buffer->name);
  if (write && !buffer->writable) fail("write to the input %s at byte %zu", buffer->name, offset);
  if (!buffer->writable) return;

  const int kind = buffer == &shared;
  for (size_t cell = offset / kCell; cell <= (offset + size - 1) / kCell; cell++) {
    Cell& seen = buffer->cells[cell];
    const bool fresh = kind && !same_threadgroup(seen.write);  // written by an earlier threadgroup
    const Moment now = {first_number + current + 1, barriers[kind], fiber.simdgroup_barriers[kind]};
    if (kind && !same_threadgroup(seen.read) && seen.read.who != kMany) seen.read = {};
    if (kind && seen.read.who == kMany && fresh) seen.read = {};
    if (write) {
      if ((!fresh && !before(seen.write, kind)) || !before(seen.read, kind)) {
        fail("race: write at byte %zu of %s, which another thread touched with no barrier between", offset, buffer->name);
      }
      seen.write = now;
      seen.read = {};
    } else {
      if (fresh || (seen.write.who == kNobody && !buffer->initialised)) {
        fail("read of what nobody wrote at byte %zu of %s", offset, buffer->name);
      }
      if (!before(seen.write, kind)) {
        fail("race: read at byte %zu of %s, which another thread wrote with no barrier between", offset, buffer->name);
      }
      const bool alone = seen.read.who == kNobody || seen.read.who == now.who || before(seen.read, kind);
      seen.read = now;
      if (!alone) seen.read.who = kMany;
    }
  }
}

// Switch fibers without a system call, unlike swapcontext.
static void pause(Fiber& fiber) {
  if (!_setjmp(fiber.place)) _longjmp(scheduler, 1);
}

static void resume(Fiber& fiber) {
  if (!_setjmp(scheduler)) _longjmp(fiber.place, 1);
}

// Run the kernel once for each threadgroup.
static void run_fiber() {
  Fiber& fiber = fibers[current];
  while (true) {
    pause(fiber);
    entry(arguments, &fiber.position);
    fiber.finished = true;
  }
}

static void make_fibers(char* stacks) {
  for (current = 0; current < thread_count; current++) {
    ucontext_t begin, here;
    fibers[current].stack = stacks + kStack * current;
    getcontext(&begin);
    begin.uc_stack.ss_sp = fibers[current].stack;
    begin.uc_stack.ss_size = kStack;
    begin.uc_link = nullptr;
    makecontext(&begin, run_fiber, 0);
    if (!_setjmp(scheduler)) swapcontext(&here, &begin);
  }
  current = 0;
}

static void wait(Waiting kind, int site, int flags) {
  Fiber& fiber = fibers[current];
  fiber.waiting = kind;
  fiber.site = site;
  fiber.flags = flags;
  pause(fiber);
}

// Release the threads from `first` on if all of them wait for the same event.
static bool release(int first, int last, Waiting kind, int* count) {
  if (*count < last - first) return false;
  for (int i = first; i < last; i++) {
    if (fibers[i].site != fibers[first].site || fibers[i].flags != fibers[first].flags) {
      current = i;
      fail("threads wait at different places: lines %d and %d", fibers[first].site, fibers[i].site);
    }
    fibers[i].waiting = Waiting::kNo;
  }
  *count = 0;
  return true;
}

static void run_threadgroup() {
  for (int i = 0; i < thread_count; i++) {
    Fiber& fiber = fibers[i];
    fiber.waiting = Waiting::kNo;
    fiber.finished = false;
    fiber.simdgroup_barriers[0] = fiber.simdgroup_barriers[1] = 0;
  }
  memset(simdgroups, 0, sizeof simdgroups);
  barriers[0] = barriers[1] = 0;
  arrived = 0;
  for (bool running = true; running;) {
    running = false;
    bool waiting = false;
    for (current = 0; current < thread_count; current++) {
      Fiber& fiber = fibers[current];
      if (fiber.finished) continue;
      if (fiber.waiting != Waiting::kNo) {
        waiting = true;
        continue;
      }
      running = true;
      resume(fiber);
    }
    if (waiting && !running) {
      for (current = 0; fibers[current].finished || fibers[current].waiting == Waiting::kNo;) current++;
      fail("divergence: a thread waits at line %d for others that do not come", fibers[current].site);
    }
  }
}

}  // namespace machine

void metal_barrier(int flags, bool whole_threadgroup, int site) {
  using namespace machine;
  if (whole_threadgroup) {
    arrived++;
    const int mine = current;
    fibers[mine].waiting = Waiting::kThreadgroup;
    fibers[mine].site = site;
    fibers[mine].flags = flags;
    if (release(0, thread_count, Waiting::kThreadgroup, &arrived)) {
      barriers[0] += flags & 1;
      barriers[1] += flags >> 1 & 1;
      current = mine;
    } else {
      wait(Waiting::kThreadgroup, site, flags);
    }
    return;
  }
  metal_exchange(0, site);
  fibers[current].simdgroup_barriers[0] += flags & 1;
  fibers[current].simdgroup_barriers[1] += flags >> 1 & 1;
}

const uint* metal_exchange(uint value, int site) {
  using namespace machine;
  const int mine = current, first = mine / 32 * 32;
  if (first + 32 > thread_count) fail("a simdgroup operation in a simdgroup of fewer than 32 threads");
  Simdgroup& simdgroup = simdgroups[first / 32];
  uint* values = simdgroup.values[simdgroup.generation & 1];
  values[mine - first] = value;
  simdgroup.arrived++;
  fibers[mine].waiting = Waiting::kExchange;
  fibers[mine].site = site;
  fibers[mine].flags = 0;
  if (release(first, first + 32, Waiting::kExchange, &simdgroup.arrived)) {
    simdgroup.generation++;
    current = mine;
  } else {
    wait(Waiting::kExchange, site, 0);
  }
  return values;
}

uint metal_lane() { return machine::current % 32; }

extern "C" {
// Clang merges adjacent accesses into unaligned accesses; explicit accesses of the kernel are marked as aligned.
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define ACCESS(SIZE)                                                                        \
  void __tsan_read##SIZE(void* at) { machine::touch(at, SIZE, false, true); }               \
  void __tsan_write##SIZE(void* at) { machine::touch(at, SIZE, true, true); }               \
  void __tsan_unaligned_read##SIZE(void* at) { machine::touch(at, SIZE, false, false); }    \
  void __tsan_unaligned_write##SIZE(void* at) { machine::touch(at, SIZE, true, false); }    \
  void __tsan_read_write##SIZE(void* at) { machine::touch(at, SIZE, false, true), machine::touch(at, SIZE, true, true); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
#undef ACCESS
void* __tsan_memcpy(void* to, const void* from, unsigned long size) { return memcpy(to, from, size); }
void* __tsan_memset(void* to, int value, unsigned long size) { return memset(to, value, size); }
// Convert a float to bf16, as clang's code requires: round to nearest, ties to even.
__bf16 __truncsfbf2(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return __builtin_bit_cast(__bf16, uint16_t(nan ? bits >> 16 | 0x40 : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16));
}

// Run the kernel `call` on `count` buffers; return null or an error message. Store the number of unwritten bytes of
// every output in `unwritten`, and the first of them in `first`.
const char* metal_run(void (*call)(void**, const Position*), int count, const char** names, void** data,
                      const size_t* sizes, const uint8_t* writable, const uint8_t* initialised, const uint32_t* grid,
                      const uint32_t* group, size_t* unwritten, size_t* first) {
  using namespace machine;
  entry = call;
  arguments = data;
  thread_count = group[0] * group[1] * group[2];
  fibers = (Fiber*)calloc(thread_count, sizeof(Fiber));
  char* stacks = (char*)mmap(nullptr, kStack * thread_count, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  make_fibers(stacks);
  buffers = (Buffer*)calloc(count, sizeof(Buffer));
  buffer_count = count;
  for (int i = 0; i < count; i++) {
    buffers[i] = {names[i], (char*)data[i], sizes[i], writable[i] != 0, initialised[i] != 0, nullptr};
    if (writable[i]) buffers[i].cells = (Cell*)calloc(sizes[i] / kCell + 1, sizeof(Cell));
  }
  shared = {"threadgroup memory", __start_metal_threadgroup,
            size_t(__stop_metal_threadgroup - __start_metal_threadgroup), true, false, nullptr};
  shared.cells = (Cell*)calloc(shared.size / kCell + 1, sizeof(Cell));
  const char* result = nullptr;
  first_number = 0;
  if (setjmp(failed)) {
    result = message;
  } else {
    if (shared.size > kThreadgroupMemory) fail("%zu bytes of threadgroup memory; Metal has %u", shared.size, kThreadgroupMemory);
    const uint3 groups = {grid[0] / group[0], grid[1] / group[1], grid[2] / group[2]};
    for (uint z = 0; z < groups.z; z++)
      for (uint y = 0; y < groups.y; y++)
        for (uint x = 0; x < groups.x; x++) {
          for (int i = 0; i < thread_count; i++) {
            const uint3 own = {i % group[0], i / group[0] % group[1], i / group[0] / group[1]};
            Position& position = fibers[i].position;
            position.threadgroup_position_in_grid = uint3{x, y, z};
            position.thread_position_in_threadgroup = own;
            position.threads_per_threadgroup = uint3{group[0], group[1], group[2]};
            position.threadgroups_per_grid = groups;
            position.threads_per_grid = uint3{grid[0], grid[1], grid[2]};
            position.thread_position_in_grid =
                uint3{x * group[0] + own.x, y * group[1] + own.y, z * group[2] + own.z};
            position.thread_index_in_threadgroup = i;
            position.thread_index_in_simdgroup = i % 32;
            position.simdgroup_index_in_threadgroup = i / 32;
            position.simdgroups_per_threadgroup = (thread_count + 31) / 32;
            position.threads_per_simdgroup = 32;
          }
          run_threadgroup();
          first_number += thread_count;
        }
    for (int i = 0; i < count; i++) {
      unwritten[i] = 0;
      if (!buffers[i].writable || buffers[i].initialised) continue;
      for (size_t cell = 0; cell * kCell < sizes[i]; cell++) {
        if (buffers[i].cells[cell].write.who == kNobody) {
          if (!unwritten[i]) first[i] = cell * kCell;
          unwritten[i] += kCell;
        }
      }
    }
  }
  munmap(stacks, kStack * thread_count);
  for (int i = 0; i < count; i++) free(buffers[i].cells);
  free(shared.cells);
  free(buffers);
  free(fibers);
  return result;
}
}
