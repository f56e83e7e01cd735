// Running a loop on several threads, and memory aligned for vectors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace turbo {

using LoopBody = void (*)(void* context, std::int64_t index);

// Calls body(context, i) once for every i in [0, count) on up to `threads` threads. Uses the OpenMP
// runtime that is already loaded with PyTorch (its threads are warm, and a second pool would fight
// with it), else threads of its own. The first exception of a body is thrown again when all are done.
void parallel_loop(std::int64_t count, int threads, LoopBody body, void* context);

// The most threads that shared a loop since the last call: for tests.
int take_most_workers();

// 64-byte aligned; throws std::bad_alloc.
void* allocate(std::size_t bytes);
void release(void* memory);

// What carries the threads: "openmp" or "std::thread".
const char* thread_provider();

template <class F>
void parallel_for(std::int64_t count, int threads, F&& body) {
    auto* context = const_cast<void*>(static_cast<const void*>(&body));
    using Body = std::remove_reference_t<F>;
    parallel_loop(count, threads, [](void* c, std::int64_t i) { (*static_cast<Body*>(c))(i); }, context);
}

}  // namespace turbo
