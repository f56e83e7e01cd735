// Memory of one instruction set's kernels. Containers of the standard library are avoided in them:
// their functions are merged by name across files, and the one kept may use instructions that the
// processor at hand lacks.
#pragma once

template <class T>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(std::size_t count) { hold(count); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { ::turbo::release(data_); }

    // Room for `count` elements; what was in it is gone where it grows.
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
