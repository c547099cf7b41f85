// Bulk copies to the device through two pinned buffers: while the device fetches one, the host fills the
// other (from a mapped file, that is when its pages are read).
#ifndef ATP_KERNELS_CUDA_UPLOAD_H_
#define ATP_KERNELS_CUDA_UPLOAD_H_

#include <cuda_runtime.h>

#include <cstddef>

namespace atp::cuda {

class Uploader {
 public:
  Uploader() = default;
  Uploader(const Uploader&) = delete;
  Uploader& operator=(const Uploader&) = delete;
  ~Uploader();

  // `host` may be changed or freed once this has returned; the device has the bytes when the stream gets
  // there.
  cudaError_t Copy(void* device, const void* host, size_t bytes, cudaStream_t stream);

 private:
  struct Slot {
    void* pinned = nullptr;
    cudaEvent_t done = nullptr;  // recorded after the slot's last copy
  };
  cudaError_t Prepare(Slot* slot);

  Slot slots_[2];
  int next_ = 0;
};

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_UPLOAD_H_
