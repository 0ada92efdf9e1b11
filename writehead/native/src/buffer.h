// Scratch memory that grows to the largest call and stays.
#ifndef WRITEHEAD_BUFFER_H
#define WRITEHEAD_BUFFER_H

#include <cstdlib>
#include <cstring>
#include <new>

namespace wh {

// An aligned array of numbers; what it held is lost when it grows.
template <class T>
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    // Makes room for n numbers; new room holds zeros.
    void reserve(size_t n) {
        const size_t bytes = (n * sizeof(T) + 63) / 64 * 64;
        if (bytes <= held_) return;
        std::free(data_);
        held_ = 0;
        data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
        if (!data_) throw std::bad_alloc();
        std::memset(data_, 0, bytes);
        held_ = bytes;
    }

    T* data() const { return data_; }
    T& operator[](size_t i) const { return data_[i]; }

  private:
    T* data_ = nullptr;
    size_t held_ = 0;
};

}  // namespace wh
#endif
