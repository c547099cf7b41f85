#include "kernels/cuda/upload.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cuda/weight_planes.h"
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

cudaError_t Uploader::CopyAsPlanes(DType dtype, void* device, const TensorView& host, cudaStream_t stream) {
  // A slot takes whole runs, their planes one behind the other. No plane has more than a byte per element.
  constexpr int64_t kRunElements = kRun, kSlotElements = kSlotBytes / 2 / kRun * kRun;
  const int64_t elements = host.rows * host.cols;
  const WeightPlaneBytes all = PlaneBytes(dtype, elements);
  std::vector<float> values(kRun);
  std::vector<std::byte> run(RowBytes(dtype, kRunElements));
  for (int64_t done = 0; done < elements;) {
    const int64_t count = std::min(elements - done, kSlotElements);
    Slot* slot;
    cudaError_t error = Take(&slot);
    if (error != cudaSuccess) return error;
    const WeightPlaneBytes part = PlaneBytes(dtype, count);
    auto* codes = static_cast<std::byte*>(slot->pinned);
    std::byte *scales = codes + part.codes, *supers = scales + part.scales;
    for (int64_t at = 0; at < count; at += kRunElements) {
      const int64_t some = std::min(count - at, kRunElements);
      const auto* from = static_cast<const std::byte*>(host.data) + RowBytes(host.dtype, done + at);
      if (host.dtype != dtype) {
        DequantizeRow(host.dtype, from, some, values.data());
        QuantizeRow(dtype, values.data(), some, run.data());
        from = run.data();
      }
      const WeightPlaneBytes before = PlaneBytes(dtype, at);
      SplitIntoPlanes(dtype, from, some, codes + before.codes, scales + before.scales,
                      supers + before.supers);
    }
    const WeightPlaneBytes before = PlaneBytes(dtype, done);
    const auto send = [&](size_t offset, const std::byte* from, size_t bytes) {
      if (error != cudaSuccess || bytes == 0) return;
      error = cudaMemcpyAsync(static_cast<std::byte*>(device) + offset, from, bytes, cudaMemcpyHostToDevice,
                              stream);
    };
    send(before.codes, codes, part.codes);
    send(all.codes + before.scales, scales, part.scales);
    send(all.codes + all.scales + before.supers, supers, part.supers);
    if (error == cudaSuccess) error = cudaEventRecord(slot->done, stream);
    if (error != cudaSuccess) return error;
    done += count;
  }
  return cudaSuccess;
}

}  // namespace atp::cuda
