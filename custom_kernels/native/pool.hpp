// Threads that share the work of loops.
#pragma once

#include <cstdint>

namespace flashmoe {

// The body of a loop: items [begin, end), and the number of the thread (0 is the caller).
using Body = void (*)(void* context, int64_t begin, int64_t end, int thread);

constexpr int kMostThreads = 256;

// Set the number of threads, including the caller, before the first loop or between loops.
void set_threads(int count);
int threads();

// Run `body` on all of [0, count), `step` items at a time, and return when all items are done. Each thread first works
// on a contiguous range, then helps the other threads. While another caller's loop runs, the caller does all its work
// alone, so concurrent calls are correct and never use more threads than set. The first exception of a body ends the
// loop early and is rethrown in the caller; the pool remains usable. Call without the GIL.
void run(int64_t count, int64_t step, Body body, void* context);

// Run `parallel` with any callable.
template <typename Function>
void parallel(int64_t count, int64_t step, const Function& function) {
    run(count, step,
        [](void* context, int64_t begin, int64_t end, int thread) {
            (*static_cast<const Function*>(context))(begin, end, thread);
        },
        const_cast<Function*>(&function));
}

} // namespace flashmoe
