#include "tests/kernels/cuda_emulation/runtime_api.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "tests/kernels/cuda_emulation/cuda_runtime.h"

namespace {

// Of the device: what it has, and what of it is taken.
struct DeviceMemory {
  std::mutex mutex;
  size_t bytes = size_t{4} << 30;
  size_t taken = 0;
  std::map<const void*, size_t> allocations;
};
DeviceMemory& Memory() {
  static DeviceMemory memory;
  return memory;
}

std::string& Found() {
  static std::string found;
  return found;
}

std::map<const void*, atp::emulation::Kernel>& Kernels() {
  static std::map<const void*, atp::emulation::Kernel> kernels;
  return kernels;
}

// Dynamic shared memory that a kernel was granted beyond what every kernel may have.
std::map<const void*, int>& MostShared() {
  static std::map<const void*, int> most;
  return most;
}

atp::emulation::Counts& TheCounts() {
  static atp::emulation::Counts counts;
  return counts;
}

atp::emulation::Refused& TheRefused() {
  static atp::emulation::Refused refused = atp::emulation::Refused::kNothing;
  return refused;
}

// As on a device, the first error stays.
cudaError_t RunKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared_bytes) {
  const auto kernel = Kernels().find(function);
  if (kernel == Kernels().end()) return cudaErrorInvalidValue;
  if (shared_bytes > 48 * 1024 && shared_bytes > static_cast<size_t>(MostShared()[function]))
    return cudaErrorInvalidValue;
  std::string found =
      atp::emulation::Run(kernel->second.name, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z},
                          shared_bytes, [&] { kernel->second.call(function, arguments); });
  if (found.empty()) return cudaSuccess;
  if (Found().empty()) Found() = std::move(found);
  return cudaErrorLaunchFailure;
}

cudaError_t AllocateMemory(void** data, size_t bytes) {
  *data = nullptr;
  *data = std::aligned_alloc(256, (bytes + 255) / 256 * 256 + 256);
  if (*data == nullptr) return cudaErrorMemoryAllocation;
  // Fresh memory is NaN to whoever reads it.
  std::memset(*data, 0xff, bytes < (1 << 20) ? bytes : (1 << 20));
  return cudaSuccess;
}

}  // namespace

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::strcpy(properties->name, "emulated");
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return *value = atp::emulation::kMultiprocessors, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      return *value = 8, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = 9, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = static_cast<int>(atp::emulation::kMaxSharedBytes), cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const std::lock_guard<std::mutex> lock(Memory().mutex);
  *total = Memory().bytes;
  *free = Memory().bytes - std::min(Memory().taken, Memory().bytes);
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** data, size_t bytes) {
  const std::lock_guard<std::mutex> lock(Memory().mutex);
  *data = nullptr;
  if (Memory().taken > Memory().bytes || bytes > Memory().bytes - Memory().taken)
    return cudaErrorMemoryAllocation;
  const cudaError_t error = AllocateMemory(data, bytes);
  if (error == cudaSuccess) Memory().taken += Memory().allocations[*data] = bytes;
  return error;
}
cudaError_t cudaFree(void* data) {
  const std::lock_guard<std::mutex> lock(Memory().mutex);
  if (const auto found = Memory().allocations.find(data); found != Memory().allocations.end()) {
    Memory().taken -= found->second;
    Memory().allocations.erase(found);
  }
  std::free(data);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned) { return AllocateMemory(data, bytes); }
cudaError_t cudaFreeHost(void* data) { return std::free(data), cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  TheCounts().copies_to_device += kind == cudaMemcpyHostToDevice;
  TheCounts().copies_to_host += kind == cudaMemcpyDeviceToHost;
  if (bytes != 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (bytes != 0) std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return *stream = nullptr, cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return Found().empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = nullptr, cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return Found().empty() ? cudaSuccess : cudaErrorLaunchFailure; }
const char* cudaGetErrorName(cudaError_t error) {
  if (error == cudaErrorInvalidValue) return "cudaErrorInvalidValue";
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorLaunchFailure";
}
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidValue) return "invalid argument";
  return error == cudaErrorMemoryAllocation ? "out of memory" : Found().c_str();
}

// A kernel with copies of its arguments.
struct CUgraphNode_st {
  const CUgraph_st* graph = nullptr;
  size_t index = 0;  // in the graph
  const void* function = nullptr;
  dim3 grid, block;
  size_t shared_bytes = 0;
  std::vector<std::vector<std::max_align_t>> arguments;

  cudaError_t Set(const cudaKernelNodeParams& params) {
    const auto kernel = Kernels().find(params.func);
    if (kernel == Kernels().end() || params.extra != nullptr) return cudaErrorInvalidValue;
    function = params.func;
    grid = params.gridDim, block = params.blockDim, shared_bytes = params.sharedMemBytes;
    arguments.clear();
    for (size_t i = 0; i < kernel->second.sizes.size(); ++i) {
      const size_t bytes = kernel->second.sizes[i];
      arguments.emplace_back((bytes + sizeof(std::max_align_t) - 1) / sizeof(std::max_align_t));
      std::memcpy(arguments.back().data(), params.kernelParams[i], bytes);
    }
    return cudaSuccess;
  }
  cudaError_t Run() {
    std::vector<void*> pointers;
    for (auto& argument : arguments) pointers.push_back(argument.data());
    return RunKernel(function, grid, block, pointers.data(), shared_bytes);
  }
};
struct CUgraph_st {
  std::deque<CUgraphNode_st> nodes;
};
struct CUgraphExec_st {
  const CUgraph_st* graph;
  std::deque<CUgraphNode_st> nodes;
};

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<size_t>(value) > atp::emulation::kMaxSharedBytes) return cudaErrorInvalidValue;
  int& most = MostShared()[function];
  most = std::max(most, value);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  ++TheCounts().kernels;
  return RunKernel(function, grid, block, arguments, shared_bytes);
}
cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) { return *graph = new CUgraph_st, cudaSuccess; }
cudaError_t cudaGraphAddKernelNode(cudaGraphNode_t* node, cudaGraph_t graph,
                                   const cudaGraphNode_t* dependencies, size_t count,
                                   const cudaKernelNodeParams* params) {
  // All are run one after another, so that each must wait for the one before it.
  const size_t index = graph->nodes.size();
  if (index > 0 && (count != 1 || dependencies[0] != &graph->nodes.back())) return cudaErrorInvalidValue;
  *node = &graph->nodes.emplace_back();
  (*node)->graph = graph, (*node)->index = index;
  return (*node)->Set(*params);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  if (TheRefused() == atp::emulation::Refused::kInstantiation) {
    return ++TheCounts().graphs_refused, cudaErrorMemoryAllocation;
  }
  ++TheCounts().graphs;
  return *executable = new CUgraphExec_st{graph, graph->nodes}, cudaSuccess;
}
cudaError_t cudaGraphExecKernelNodeSetParams(cudaGraphExec_t executable, cudaGraphNode_t node,
                                             const cudaKernelNodeParams* params) {
  if (node->graph != executable->graph || TheRefused() == atp::emulation::Refused::kUpdate)
    return cudaErrorInvalidValue;
  ++TheCounts().nodes_set;
  return executable->nodes[node->index].Set(*params);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  if (TheRefused() == atp::emulation::Refused::kLaunch) {
    return ++TheCounts().graphs_refused, cudaErrorMemoryAllocation;
  }
  ++TheCounts().graph_launches;
  if (!Found().empty()) return cudaErrorLaunchFailure;
  for (CUgraphNode_st& node : executable->nodes) {
    if (node.Run() != cudaSuccess) break;
  }
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return delete executable, cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }

namespace atp::emulation {

void SetDeviceBytes(size_t bytes) {
  const std::lock_guard<std::mutex> lock(Memory().mutex);
  Memory().bytes = bytes;
}

void Declare(const void* function, const Kernel& kernel) { Kernels().insert_or_assign(function, kernel); }

const Counts& Counted() { return TheCounts(); }

void Break(std::string what) { Found() = std::move(what); }

void ForgetError() { Found().clear(); }

void RefuseGraphs(Refused refused) { TheRefused() = refused; }

}  // namespace atp::emulation

namespace atp::cuda {
namespace {

float Element(const uint32_t* pairs, int index) {
  const uint32_t pair = pairs[index / 2];
  return std::bit_cast<float>(index % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
}

}  // namespace

// A[row][k] is in lane (row % 8) * 4 + k % 8 / 2; B[k][column] in lane column * 4 + k % 8 / 2.
void MmaBF16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file, int line) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const std::byte* all = emulation::Exchange("mma", mine, sizeof(mine), file, line);
  uint32_t lanes[32][6];
  std::memcpy(lanes, all, sizeof(lanes));
  const int lane = emulation::Lane(), g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int half = i / 2, column = 2 * t + i % 2;  // half: row g or g + 8
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int a_register = half + 2 * (k / 8), b_register = 4 + k / 8;
      const float x = Element(&lanes[g * 4 + k % 8 / 2][a_register], k % 2);
      const float y = Element(&lanes[column * 4 + k % 8 / 2][b_register], k % 2);
      sum += x * y;
    }
    c[i] += sum;
  }
}

namespace emulated {

void LdMatrix4(uint32_t (&out)[4], const uint4& row, bool transposed, const char* file, int line) {
  const std::byte* all = emulation::Exchange("ldmatrix", &row, sizeof(row), file, line);
  uint16_t rows[32][8];
  std::memcpy(rows, all, sizeof(rows));
  const int g = emulation::Lane() / 4, t = emulation::Lane() % 4;
  for (int j = 0; j < 4; ++j) {
    const auto* matrix = rows + 8 * j;
    const uint32_t low = transposed ? matrix[2 * t][g] : matrix[g][2 * t];
    const uint32_t high = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
    out[j] = low | high << 16;
  }
}

}  // namespace emulated

uint32_t PackBF16(float low, float high) {
  const auto bits = [](float value) -> uint32_t {
    const uint32_t raw = std::bit_cast<uint32_t>(value);
    if ((raw & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return (raw + 0x7fffu + (raw >> 16 & 1u)) >> 16;
  };
  return bits(low) | bits(high) << 16;
}

}  // namespace atp::cuda
