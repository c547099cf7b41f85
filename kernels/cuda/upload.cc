#include "kernels/cuda/upload.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/quantized.h"

namespace atp::cuda {
namespace {

constexpr size_t kSlotBytes = 8 << 20;
// Elements converted at a time: whole blocks of every dtype, whole runs in a slot.
constexpr size_t kRun = 4096;

}  // namespace

Uploader::~Uploader() {
  for (const Slot& slot : slots_) {
    if (slot.pinned == nullptr) continue;
    cudaEventDestroy(slot.done);
    cudaFreeHost(slot.pinned);
  }
}

cudaError_t Uploader::Take(Slot** taken) {
  Slot* const slot = *taken = &slots_[next_];
  next_ = 1 - next_;
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

template <class Fill>
cudaError_t Uploader::CopyFilled(void* device, size_t bytes, cudaStream_t stream, const Fill& fill) {
  for (size_t done = 0; done < bytes;) {
    const size_t piece = std::min(bytes - done, kSlotBytes);
    Slot* slot;
    cudaError_t error = Take(&slot);
    if (error != cudaSuccess) return error;
    fill(static_cast<std::byte*>(slot->pinned), done, piece);
    error = cudaMemcpyAsync(static_cast<std::byte*>(device) + done, slot->pinned, piece,
                            cudaMemcpyHostToDevice, stream);
    if (error == cudaSuccess) error = cudaEventRecord(slot->done, stream);
    if (error != cudaSuccess) return error;
    done += piece;
  }
  return cudaSuccess;
}

cudaError_t Uploader::Copy(void* device, const void* host, size_t bytes, cudaStream_t stream) {
  return CopyFilled(device, bytes, stream, [host](std::byte* to, size_t from, size_t count) {
    std::memcpy(to, static_cast<const std::byte*>(host) + from, count);
  });
}

cudaError_t Uploader::CopyAs(DType dtype, void* device, const TensorView& host, cudaStream_t stream) {
  if (host.dtype == dtype) return Copy(device, host.data, host.bytes(), stream);
  const size_t size = RowBytes(dtype, 1);
  std::vector<float> values(kRun);
  const auto fill = [&](std::byte* to, size_t from, size_t count) {
    for (size_t done = 0; done < count; done += kRun * size) {
      // Rows are whole blocks, so the matrix is one long row.
      const auto elements = static_cast<int64_t>(std::min(count - done, kRun * size) / size);
      const auto first = static_cast<int64_t>((from + done) / size);
      DequantizeRow(host.dtype, static_cast<const std::byte*>(host.data) + RowBytes(host.dtype, first),
                    elements, values.data());
      QuantizeRow(dtype, values.data(), elements, to + done);
    }
  };
  return CopyFilled(device, static_cast<size_t>(host.rows * host.cols) * size, stream, fill);
}

cudaError_t Uploader::CopyAsQ8(void* device, const TensorView& host, cudaStream_t stream) {
  constexpr size_t kElements = BlockOf(DType::kQ8_0).elements, kBytes = BlockOf(DType::kQ8_0).bytes;
  constexpr size_t kScale = kBytes - kElements, kRunBlocks = kRun / kElements;
  constexpr size_t kSlotBlocks = kSlotBytes / kBytes / kRunBlocks * kRunBlocks;
  const auto elements = static_cast<size_t>(host.rows * host.cols), blocks = elements / kElements;
  auto* to = static_cast<std::byte*>(device);
  std::vector<float> values(kRun);
  std::vector<std::byte> run(kRunBlocks * kBytes);
  for (size_t done = 0; done < blocks;) {
    const size_t count = std::min(blocks - done, kSlotBlocks);
    Slot* slot;
    cudaError_t error = Take(&slot);
    if (error != cudaSuccess) return error;
    auto* pinned = static_cast<std::byte*>(slot->pinned);
    for (size_t at = 0; at < count; at += kRunBlocks) {
      const size_t some = std::min(count - at, kRunBlocks);
      const auto first = static_cast<int64_t>((done + at) * kElements);
      const auto* from = static_cast<const std::byte*>(host.data) + RowBytes(host.dtype, first);
      if (host.dtype != DType::kQ8_0) {
        DequantizeRow(host.dtype, from, static_cast<int64_t>(some * kElements), values.data());
        QuantizeRow(DType::kQ8_0, values.data(), static_cast<int64_t>(some * kElements), run.data());
        from = run.data();
      }
      for (size_t b = at; b < at + some; ++b, from += kBytes) {
        std::memcpy(pinned + count * kElements + b * kScale, from, kScale);
        std::memcpy(pinned + b * kElements, from + kScale, kElements);
      }
    }
    error = cudaMemcpyAsync(to + done * kElements, pinned, count * kElements, cudaMemcpyHostToDevice, stream);
    if (error == cudaSuccess) {
      error = cudaMemcpyAsync(to + elements + done * kScale, pinned + count * kElements, count * kScale,
                              cudaMemcpyHostToDevice, stream);
    }
    if (error == cudaSuccess) error = cudaEventRecord(slot->done, stream);
    if (error != cudaSuccess) return error;
    done += count;
  }
  return cudaSuccess;
}

}  // namespace atp::cuda
