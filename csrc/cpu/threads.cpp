#include "threads.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <new>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace turbo {
namespace {

struct Loop {
    std::int64_t count;
    LoopBody body;
    void* context;
    std::atomic<std::int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error{};
    std::atomic<int> workers{0};

    void work() {
        bool counted = false;
        for (std::int64_t i; !failed.load(std::memory_order_relaxed) && (i = next.fetch_add(1)) < count;) {
            if (!counted) ++workers, counted = true;
            try {
                body(context, i);
            } catch (...) {
                if (!failed.exchange(true)) error = std::current_exception();
            }
        }
    }
};

std::atomic<int> most_workers{0};

void work_on(void* loop) { static_cast<Loop*>(loop)->work(); }

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// libgomp's entry point for parallel regions, if PyTorch has loaded it globally.
GompParallel find_openmp() {
#if defined(_WIN32)
    return nullptr;
#else
    return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#endif
}

GompParallel openmp() {
    static const GompParallel found = find_openmp();
    return found;
}

}  // namespace

void parallel_loop(std::int64_t count, int threads, LoopBody body, void* context) {
    Loop loop{count, body, context};
    const auto wanted = static_cast<unsigned>(std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(count, 1)));
    if (wanted == 1) {
        loop.work();
    } else if (openmp()) {
        openmp()(work_on, &loop, wanted, 0);
    } else {
        std::vector<std::thread> others;
        for (unsigned i = 1; i < wanted; ++i) others.emplace_back(work_on, &loop);
        loop.work();
        for (auto& other : others) other.join();
    }
    int most = most_workers.load();
    while (most < loop.workers && !most_workers.compare_exchange_weak(most, loop.workers)) {
    }
    if (loop.error) std::rethrow_exception(loop.error);
}

int take_most_workers() { return most_workers.exchange(0); }

void* allocate(std::size_t bytes) {
    const std::size_t rounded = (bytes + 63) / 64 * 64;
#if defined(_WIN32)
    void* memory = _aligned_malloc(std::max<std::size_t>(rounded, 64), 64);
#else
    void* memory = std::aligned_alloc(64, std::max<std::size_t>(rounded, 64));
#endif
    if (!memory) throw std::bad_alloc();
    return memory;
}

void release(void* memory) {
#if defined(_WIN32)
    _aligned_free(memory);
#else
    std::free(memory);
#endif
}

const char* thread_provider() { return openmp() ? "openmp" : "std::thread"; }

}  // namespace turbo
