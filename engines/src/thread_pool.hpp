// A small persistent pool for the host driver. It never spins: between calls its threads sleep on a condition
// variable, so the cores belong to the engine that runs between two steps.
#pragma once

#include <cstdint>

namespace tstitch {

// Calls body(context, i) once for every i in [0, items), on the calling thread and at most threads - 1 others, and
// returns when all are done. Which thread takes which item is open, so items must be independent. When the pool is busy
// with another caller, or threads can't be started, the calling thread does the work alone. The pool is made at the
// first use in each process; a forked child makes its own.
void parallel_for(std::int64_t items, int threads, void (*body)(void*, std::int64_t), void* context);

// The number of CPUs this process may run on.
int available_threads();

template <typename Body>
void parallel_for(std::int64_t items, int threads, Body& body) {
    parallel_for(items, threads, [](void* context, std::int64_t i) { (*static_cast<Body*>(context))(i); }, &body);
}

}  // namespace tstitch
