// Device memory with one owner. Allocated at start-up only; freed with the object.
#ifndef ATP_KERNELS_BUFFER_H_
#define ATP_KERNELS_BUFFER_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <utility>

namespace atp {

class Buffer {
 public:
  using Deleter = std::function<void(void*)>;

  Buffer() = default;
  Buffer(void* data, size_t bytes, Deleter deleter) : data_(data, std::move(deleter)), bytes_(bytes) {}

  std::byte* data() const { return static_cast<std::byte*>(data_.get()); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_.get());
  }
  size_t bytes() const { return bytes_; }

 private:
  std::unique_ptr<void, Deleter> data_{nullptr, [](void*) {}};
  size_t bytes_ = 0;
};

}  // namespace atp

#endif  // ATP_KERNELS_BUFFER_H_
