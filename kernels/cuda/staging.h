// Tables of a step (row indices, positions, block ids) on their way to the device, and what ops report on its
// way back, through pinned memory; and the scratch of ops.
//
// Nothing here waits for the device inside a step. Memory is reserved at start for the largest step; one that
// needs more all the same (block tables of many sequences over one long prefix) grows it, for good.
#ifndef ATP_KERNELS_CUDA_STAGING_H_
#define ATP_KERNELS_CUDA_STAGING_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

namespace atp::cuda {

// The next of 4, 5, 6, 7 times a power of two, at least 256: sizes that are nearly the same become the same,
// so that what lies behind them has the same address in the next step.
size_t SizeClass(size_t bytes);

// Device memory that an op uses while it runs; the next op on the stream may use it again.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace();

  // Once per op: a second call may move it. 256-byte aligned; null, with *error set, when the device has no
  // more.
  void* Reserve(size_t bytes, cudaError_t* error);
  size_t bytes() const { return bytes_; }
  // The device has done all that was sent: memory that was grown out of is given back; all of it.
  void Reset();
  void Release();

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  std::vector<void*> outgrown_;
};

class Staging {
 public:
  Staging() = default;
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  ~Staging();

  // Makes room for tables and results of so many bytes in a step. Nothing may be under way.
  cudaError_t Reserve(size_t sent, size_t received);

  // Room for `bytes` of a table: fill `host`, then Send(). Both are 256-byte aligned.
  struct Table {
    std::byte* host = nullptr;
    std::byte* device = nullptr;
    size_t bytes = 0;
  };
  Table Take(size_t bytes, cudaError_t* error);
  cudaError_t Send(const Table& table, cudaStream_t stream) const;

  // Take, copy and Send; the device address, or null with *error set.
  template <class T>
  const T* Upload(std::span<const T> values, cudaStream_t stream, cudaError_t* error) {
    const Table table = Take(values.size_bytes(), error);
    if (table.host == nullptr) return nullptr;
    if (!values.empty()) std::memcpy(table.host, values.data(), values.size_bytes());
    *error = Send(table, stream);
    return *error == cudaSuccess ? reinterpret_cast<const T*>(table.device) : nullptr;
  }

  // From here on Send() does nothing: SendAll() sends all tables since the last Reset(), in one copy.
  void Defer() { deferred_ = true; }
  cudaError_t SendAll(cudaStream_t stream);

  // Device memory for `bytes` of results. The host's `to` has them after Fetch(), synchronization of the
  // stream and Reset(), zeros where there was no Fetch(). Null, with *error set.
  void* Receive(void* to, size_t bytes, cudaError_t* error);
  cudaError_t Fetch(cudaStream_t stream) const;

  // The device has done all that was sent: its room may be used again, all tables are gone.
  void Reset();

 private:
  // Pinned memory and device memory side by side.
  class Area {
   public:
    ~Area() { Free(); }
    Table Take(size_t bytes, cudaError_t* error);
    cudaError_t Copy(cudaMemcpyKind kind, cudaStream_t stream) const;  // all that is taken
    // Nothing is taken, and all room is in one piece again.
    void Reset();
    cudaError_t Reserve(size_t bytes);

   private:
    struct Chunk {
      std::byte* host;  // pinned
      std::byte* device;
      size_t bytes, used;
    };
    cudaError_t Grow(size_t bytes);
    void Free();

    std::vector<Chunk> chunks_;  // tables are taken from the last; one, unless a step outgrew it
  };
  struct Received {
    void* to;
    const std::byte* pinned;
    size_t bytes;
  };

  Area sent_, results_;
  bool deferred_ = false;
  std::vector<Received> received_;  // since the last Reset()
};

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_STAGING_H_
