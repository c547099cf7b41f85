#include "kernels/cuda/upload.h"

#include <algorithm>
#include <cstring>

namespace atp::cuda {
namespace {

constexpr size_t kSlotBytes = 8 << 20;

}  // namespace

Uploader::~Uploader() {
  for (const Slot& slot : slots_) {
    if (slot.pinned == nullptr) continue;
    cudaEventDestroy(slot.done);
    cudaFreeHost(slot.pinned);
  }
}

cudaError_t Uploader::Prepare(Slot* slot) {
  if (slot->pinned != nullptr) return cudaEventSynchronize(slot->done);
  void* pinned = nullptr;
  cudaError_t error = cudaHostAlloc(&pinned, kSlotBytes, cudaHostAllocDefault);
  if (error != cudaSuccess) return error;
  error = cudaEventCreateWithFlags(&slot->done, cudaEventDisableTiming);
  if (error != cudaSuccess) {
    cudaFreeHost(pinned);
    return error;
  }
  slot->pinned = pinned;
  return cudaSuccess;
}

cudaError_t Uploader::Copy(void* device, const void* host, size_t bytes, cudaStream_t stream) {
  for (size_t done = 0; done < bytes;) {
    const size_t piece = std::min(bytes - done, kSlotBytes);
    Slot& slot = slots_[next_];
    next_ = 1 - next_;
    cudaError_t error = Prepare(&slot);
    if (error != cudaSuccess) return error;
    std::memcpy(slot.pinned, static_cast<const std::byte*>(host) + done, piece);
    error = cudaMemcpyAsync(static_cast<std::byte*>(device) + done, slot.pinned, piece,
                            cudaMemcpyHostToDevice, stream);
    if (error == cudaSuccess) error = cudaEventRecord(slot.done, stream);
    if (error != cudaSuccess) return error;
    done += piece;
  }
  return cudaSuccess;
}

}  // namespace atp::cuda
