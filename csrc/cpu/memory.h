// Memory of the kernels of one instruction set. They avoid containers of the standard library: the linker merges their
// functions across files by name, and may keep one with instructions that the processor does not have.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "threads.h"

// TURBO_ALWAYS_INLINE is for small vector functions in inner loops, since a call would pass the vectors through memory;
// TURBO_NEVER_INLINE for large functions, which would take registers from the other loops of their callers.
#if defined(__GNUC__)
#define TURBO_ALWAYS_INLINE inline __attribute__((always_inline))
#define TURBO_NEVER_INLINE inline __attribute__((noinline))
#else
#define TURBO_ALWAYS_INLINE inline
#define TURBO_NEVER_INLINE inline
#endif

namespace turbo::TURBO_ISA {

template <class T>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(std::size_t count) { hold(count); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { ::turbo::release(data_); }

    // Makes room for `count` elements; growing discards the contents.
    void hold(std::size_t count) {
        if (count <= size_) return;
        ::turbo::release(data_);
        data_ = nullptr, size_ = 0;
        data_ = static_cast<T*>(::turbo::allocate(count * sizeof(T)));
        size_ = count;
    }
    T& operator[](std::size_t i) { return data_[i]; }

  private:
    T* data_ = nullptr;
    std::size_t size_ = 0;
};

template <class T>
inline void fill(T* at, std::int64_t count, T value) {
    for (std::int64_t i = 0; i < count; ++i) at[i] = value;
}

}  // namespace turbo::TURBO_ISA
