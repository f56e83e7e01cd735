// Parallel loops, and memory aligned for vectors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace turbo {

using LoopBody = void (*)(void* context, std::int64_t index);

// Calls body(context, i) once for every i in [0, count) on up to `threads` threads. Uses the OpenMP runtime that
// PyTorch has loaded, since a second thread pool would compete with it, else new threads. After an exception no further
// iterations start; the first exception is rethrown when all threads are done.
void parallel_loop(std::int64_t count, int threads, LoopBody body, void* context);

// The largest number of threads that worked on one loop since the last call, for tests.
int take_most_workers();

// 64-byte aligned; throws std::bad_alloc.
void* allocate(std::size_t bytes);
void release(void* memory);

// The source of threads: "openmp" or "std::thread".
const char* thread_provider();

template <class F>
void parallel_for(std::int64_t count, int threads, F&& body) {
    auto* context = const_cast<void*>(static_cast<const void*>(&body));
    using Body = std::remove_reference_t<F>;
    parallel_loop(count, threads, [](void* c, std::int64_t i) { (*static_cast<Body*>(c))(i); }, context);
}

}  // namespace turbo
