#ifndef ATP_KERNELS_CPU_SCRATCH_H_
#define ATP_KERNELS_CPU_SCRATCH_H_

#include <cstddef>
#include <memory>
#include <new>

namespace atp::cpu {

// 64-byte aligned memory of one thread or op, whose content an op may not rely on: grows to the largest op
// seen (the first steps), then stays.
class Scratch {
 public:
  float* Reserve(size_t floats) {
    if (floats > size_) {
      memory_.reset(static_cast<float*>(::operator new (floats * sizeof(float), std::align_val_t{64})));
      size_ = floats;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { ::operator delete (memory, std::align_val_t{64}); }
  };
  std::unique_ptr<float, Free> memory_;
  size_t size_ = 0;
};

}  // namespace atp::cpu

#endif  // ATP_KERNELS_CPU_SCRATCH_H_
