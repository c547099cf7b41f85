#include "kernels/cuda/step_graph.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace atp::cuda {
namespace {

constexpr size_t kArgumentAlignment = 16;
constexpr size_t kSharedWithoutAsking = 48 * 1024;
// A class of batches has a few kinds of steps: with and without kept queries, fits, log probabilities.
constexpr size_t kMostGraphs = 32;
constexpr int kFirstPause = 16, kLongestPause = 4096;  // steps without graphs

size_t Aligned(size_t offset) {
  return (offset + kArgumentAlignment - 1) / kArgumentAlignment * kArgumentAlignment;
}

bool SameSize(const dim3& a, const dim3& b) { return a.x == b.x && a.y == b.y && a.z == b.z; }

}  // namespace

void StepGraph::Calls::Clear() {
  calls_.clear();
  offsets_.clear();
  bytes_.clear();
}

void StepGraph::Calls::Add(const KernelCall& call) {
  Call kept{call.function,   call.grid,         call.block,    static_cast<unsigned>(call.shared_bytes),
            offsets_.size(), call.sizes.size(), bytes_.size(), 0};
  for (size_t i = 0; i < call.sizes.size(); ++i) {
    const size_t at = bytes_.size();
    offsets_.push_back(at);
    bytes_.resize(Aligned(at + call.sizes[i]));
    std::memcpy(bytes_.data() + at, call.arguments[i], call.sizes[i]);
  }
  kept.end = bytes_.size();
  calls_.push_back(kept);
}

cudaKernelNodeParams StepGraph::Calls::Params(size_t index) {
  const Call& call = calls_[index];
  pointers_.clear();
  for (size_t i = 0; i < call.arguments; ++i)
    pointers_.push_back(bytes_.data() + offsets_[call.first_argument + i]);
  cudaKernelNodeParams params = {};
  params.func = const_cast<void*>(call.function);
  params.gridDim = call.grid;
  params.blockDim = call.block;
  params.sharedMemBytes = call.shared_bytes;
  params.kernelParams = pointers_.data();
  return params;
}

bool StepGraph::Calls::Same(size_t index, const Calls& other) const {
  const Call &a = calls_[index], &b = other.calls_[index];
  return a.function == b.function && SameSize(a.grid, b.grid) && SameSize(a.block, b.block) &&
         a.shared_bytes == b.shared_bytes && a.end - a.begin == b.end - b.begin &&
         std::equal(bytes_.begin() + static_cast<std::ptrdiff_t>(a.begin),
                    bytes_.begin() + static_cast<std::ptrdiff_t>(a.end),
                    other.bytes_.begin() + static_cast<std::ptrdiff_t>(b.begin));
}

StepGraph::Graph::~Graph() {
  if (executable != nullptr) cudaGraphExecDestroy(executable);
  if (graph != nullptr) cudaGraphDestroy(graph);
}

// One node after another: each kernel reads what the one before it wrote.
cudaError_t StepGraph::Graph::Make(Calls& made_of) {
  cudaError_t error = cudaGraphCreate(&graph, 0);
  for (size_t i = 0; i < made_of.count() && error == cudaSuccess; ++i) {
    const cudaKernelNodeParams params = made_of.Params(i);
    cudaGraphNode_t node;
    error = cudaGraphAddKernelNode(&node, graph, i > 0 ? &nodes.back() : nullptr, i > 0 ? 1 : 0, &params);
    nodes.push_back(node);
  }
  if (error == cudaSuccess) error = cudaGraphInstantiate(&executable, graph, 0);
  return error;
}

// made_of: as many as there are nodes.
cudaError_t StepGraph::Graph::Update(Calls& made_of) {
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (made_of.Same(i, calls)) continue;
    const cudaKernelNodeParams params = made_of.Params(i);
    const cudaError_t error = cudaGraphExecKernelNodeSetParams(executable, nodes[i], &params);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

StepGraph::~StepGraph() = default;

void StepGraph::Begin(int rows) {
  calls_.Clear();
  size_class_ = static_cast<int>(std::bit_ceil(static_cast<unsigned>(rows)));
  open_ = true;
}

void StepGraph::Add(const KernelCall& call) { calls_.Add(call); }

void StepGraph::Drop() {
  calls_.Clear();
  open_ = false;
}

cudaGraphExec_t StepGraph::Executable() {
  auto found = std::find_if(graphs_.begin(), graphs_.end(), [this](const Graph& graph) {
    return graph.size_class == size_class_ && graph.nodes.size() == calls_.count();
  });
  if (found != graphs_.end()) {
    graphs_.splice(graphs_.begin(), graphs_, found);
    if (found->Update(calls_) != cudaSuccess) {
      cudaGetLastError();  // a kernel of another kind than was there: made anew
      graphs_.pop_front();
      found = graphs_.end();
    }
  }
  if (found == graphs_.end()) {
    if (graphs_.size() == kMostGraphs) graphs_.pop_back();
    graphs_.emplace_front();
    graphs_.front().size_class = size_class_;
    if (graphs_.front().Make(calls_) != cudaSuccess) {
      cudaGetLastError();
      graphs_.pop_front();
      Pause();
      return nullptr;
    }
  }
  std::swap(graphs_.front().calls, calls_);
  return graphs_.front().executable;
}

cudaError_t StepGraph::Launch(cudaStream_t stream) {
  open_ = false;
  if (calls_.count() == 0) return cudaSuccess;
  const cudaGraphExec_t executable = Executable();
  cudaError_t error = executable != nullptr ? cudaGraphLaunch(executable, stream) : LaunchOneByOne(stream);
  if (executable != nullptr && error == cudaErrorMemoryAllocation) {  // it gets its memory only here
    cudaGetLastError();
    std::swap(graphs_.front().calls, calls_);
    graphs_.pop_front();
    Pause();
    error = LaunchOneByOne(stream);
  } else if (executable != nullptr) {
    pause_ = 0;
  }
  calls_.Clear();
  return error;
}

void StepGraph::Pause() { wait_ = pause_ = std::clamp(2 * pause_, kFirstPause, kLongestPause); }

cudaError_t StepGraph::LaunchOneByOne(cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (size_t i = 0; i < calls_.count() && error == cudaSuccess; ++i) {
    const cudaKernelNodeParams params = calls_.Params(i);
    error = cudaLaunchKernel(params.func, params.gridDim, params.blockDim, params.kernelParams,
                             params.sharedMemBytes, stream);
  }
  return error;
}

cudaError_t Enqueue(const Stream& stream, const KernelCall& call) {
  if (call.shared_bytes > kSharedWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(call.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(call.shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // the op's, not a later one's
      return error;
    }
  }
  if (stream.graph != nullptr && stream.graph->open()) {
    stream.graph->Add(call);
    return cudaSuccess;
  }
  return cudaLaunchKernel(call.function, call.grid, call.block, call.arguments, call.shared_bytes, stream);
}

}  // namespace atp::cuda
