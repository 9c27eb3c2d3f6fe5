// Threads that wait for a loop to share.
#pragma once

#include <cstdint>

namespace flashmoe {

// The loop's body: items [begin, end), and which of the threads runs it (0 is the caller).
using Body = void (*)(void* context, int64_t begin, int64_t end, int thread);

constexpr int kMostThreads = 256;

// Threads that take part, the caller included; to be set before the first loop, or between loops.
void set_threads(int count);
int threads();

// Runs `body` on all of [0, count), `step` items at a time, and returns when all of them are done. Every thread has a
// range for itself, so that it reads memory in one go, and helps the others when it is through. While another thread's
// loop is under way the caller does everything itself: many callers are right, and never more threads than were asked
// for. The first exception of a body ends the loop early and is thrown to the caller; the pool stays usable. Must be
// called without the GIL.
void run(int64_t count, int64_t step, Body body, void* context);

// The same for anything that can be called.
template <typename Function>
void parallel(int64_t count, int64_t step, const Function& function) {
    run(count, step,
        [](void* context, int64_t begin, int64_t end, int thread) {
            (*static_cast<const Function*>(context))(begin, end, thread);
        },
        const_cast<Function*>(&function));
}

} // namespace flashmoe
