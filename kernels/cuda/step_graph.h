// Kernels on their way to the stream: at once, or kept until all of a step's are known and then launched
// together, as one CUDA graph.
//
// A decode step is hundreds of short kernels, and the next one is nearly the same: other bytes in the same
// tables. Graphs are kept by size class of the batch; of a step that has as many kernels as one of them, only
// what differs (a grid, an argument) is set anew.
#ifndef ATP_KERNELS_CUDA_STEP_GRAPH_H_
#define ATP_KERNELS_CUDA_STEP_GRAPH_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <list>
#include <span>
#include <vector>

namespace atp::cuda {

// A kernel and its arguments, as the runtime takes them.
struct KernelCall {
  const char* name = "";
  const void* function = nullptr;
  dim3 grid, block;
  size_t shared_bytes = 0;
  void** arguments = nullptr;  // one for each size
  std::span<const size_t> sizes;
};

class StepGraph {
 public:
  StepGraph() = default;
  StepGraph(const StepGraph&) = delete;
  StepGraph& operator=(const StepGraph&) = delete;
  ~StepGraph();

  // Of a step that begins: whether to keep its calls. Not for a while after the driver refused a graph, most
  // likely for want of memory: to ask costs as much as a step.
  bool Wanted() { return wait_ == 0 || --wait_ == 0; }
  // From now on, Add() keeps calls. rows: of the batch.
  void Begin(int rows);
  bool open() const { return open_; }
  void Add(const KernelCall& call);
  // Launches what was kept, in its order, and is closed. A graph that the driver refuses is no error: the
  // calls are then launched one by one.
  cudaError_t Launch(cudaStream_t stream);
  // Is closed, and forgets what was kept.
  void Drop();

 private:
  // Calls one after another, with copies of their arguments.
  class Calls {
   public:
    void Clear();
    void Add(const KernelCall& call);
    size_t count() const { return calls_.size(); }
    // Valid until the next change.
    cudaKernelNodeParams Params(size_t index);
    bool Same(size_t index, const Calls& other) const;

   private:
    struct Call {
      const void* function;
      dim3 grid, block;
      unsigned shared_bytes;
      size_t first_argument, arguments;  // in offsets_
      size_t begin, end;                 // of the arguments, in bytes_
    };
    std::vector<Call> calls_;
    std::vector<size_t> offsets_;
    std::vector<std::byte> bytes_;
    std::vector<void*> pointers_;  // Params()'s
  };

  struct Graph {
    int size_class = 0;
    Calls calls;  // that the executable has
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    std::vector<cudaGraphNode_t> nodes;

    Graph() = default;
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;
    ~Graph();
    cudaError_t Make(Calls& calls);
    cudaError_t Update(Calls& calls);
  };
  // An executable of the calls, or null.
  cudaGraphExec_t Executable();
  cudaError_t LaunchOneByOne(cudaStream_t stream);
  void Pause();

  bool open_ = false;
  int wait_ = 0;   // steps until a graph is wanted again
  int pause_ = 0;  // the last wait; 0: the last graph was made
  int size_class_ = 0;
  Calls calls_;              // since Begin()
  std::list<Graph> graphs_;  // the one last used first
};

// What ops put work on. A stream alone is one that takes kernels at once.
struct Stream {
  Stream(cudaStream_t raw = nullptr, StepGraph* graph = nullptr) : raw(raw), graph(graph) {}  // NOLINT
  operator cudaStream_t() const { return raw; }                                               // NOLINT

  cudaStream_t raw;
  StepGraph* graph;
};

// To the stream, or to its graph while that is open. Fails where the device cannot give the shared memory.
cudaError_t Enqueue(const Stream& stream, const KernelCall& call);

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_STEP_GRAPH_H_
