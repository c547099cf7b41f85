// Bulk copies to the device through two pinned buffers: while the device fetches one, the host fills the
// other (from a mapped file, that is when its pages are read).
#ifndef ATP_KERNELS_CUDA_UPLOAD_H_
#define ATP_KERNELS_CUDA_UPLOAD_H_

#include <cuda_runtime.h>

#include <cstddef>

#include "kernels/tensor_view.h"

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
  // All elements of `host` as `dtype`, one that is not quantised. They are converted in the pinned buffers.
  cudaError_t CopyAs(DType dtype, void* device, const TensorView& host, cudaStream_t stream);
  // All elements as `dtype`, one that is quantised, in planes one behind the other (weight_planes.h).
  cudaError_t CopyAsPlanes(DType dtype, void* device, const TensorView& host, cudaStream_t stream);

 private:
  struct Slot {
    void* pinned = nullptr;
    cudaEvent_t done = nullptr;  // recorded after the slot's last copy
  };
  // The next slot, once the device has read it; its memory is allocated at its first use.
  cudaError_t Take(Slot** taken);
  // fill(to, from, count): bytes [from, from + count) of what the device gets, into pinned memory.
  template <class Fill>
  cudaError_t CopyFilled(void* device, size_t bytes, cudaStream_t stream, const Fill& fill);

  Slot slots_[2];
  int next_ = 0;
};

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_UPLOAD_H_
