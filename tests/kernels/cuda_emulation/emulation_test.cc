// What the emulation must find, planted; and that what is right passes.
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/staging.h"

namespace atp::cuda {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int kThreads = 64;

// As Launch() does, but with the finding for the test instead of the device's error state.
template <class... P, class... A>
std::string Find(void (*kernel)(P...), unsigned blocks, size_t shared_bytes, A... arguments) {
  return emulation::Run("Planted", {blocks, 1, 1}, {kThreads, 1, 1}, shared_bytes,
                        [&] { kernel(arguments...); });
}

// out[block] = sum of the block's threads' values, by a tree in shared memory. skip: leaves out one barrier.
__global__ void TreeSum(const float* in, float* out, int skip) {
  SharedArena arena;
  const Shared<float> sums = arena.Take<float>(kThreads);
  const int me = static_cast<int>(threadIdx.x);
  sums[me] = in[static_cast<int>(blockIdx.x) * kThreads + me];
  int level = 0;
  for (int half = kThreads / 2; half > 0; half /= 2, ++level) {
    if (level != skip) __syncthreads();
    if (me < half) sums[me] += sums[me + half];
  }
  if (me == 0) out[blockIdx.x] = sums[0];
}

class Emulation : public ::testing::Test {
 protected:
  Emulation() {
    for (int i = 0; i < 3 * kThreads; ++i) in_[i] = static_cast<float>(i);
  }
  float in_[3 * kThreads];
  float out_[3] = {};
};

TEST_F(Emulation, RunsBlocksAndBarriers) {
  EXPECT_EQ(Find(TreeSum, 3, SharedBytes<float>(kThreads), in_, out_, -1), "");
  EXPECT_THAT(out_, ::testing::ElementsAre(2016, 6112, 10208));
}

TEST_F(Emulation, FindsARaceWhereABarrierWasLeftOut) {
  for (int skip = 0; skip < 6; ++skip) {
    EXPECT_THAT(Find(TreeSum, 3, SharedBytes<float>(kThreads), in_, out_, skip),
                AllOf(HasSubstr("kernel Planted, block (2,0,0), thread ("), HasSubstr("index"),
                      ::testing::AnyOf(HasSubstr("race in shared memory"), HasSubstr("uninitialised"))))
        << skip;
  }
}

// Every thread writes its own element of `tile`, or all write element 0.
__global__ void WriteAll(int stride, bool atomic) {
  SharedArena arena;
  const Shared<int> tile = arena.Take<int>(kThreads);
  const int me = static_cast<int>(threadIdx.x);
  tile[me] = 0;
  __syncthreads();
  if (atomic) {
    tile.AtomicAdd(0, 1);
  } else {
    tile[me * stride] = me;
  }
}

TEST_F(Emulation, FindsTwoWriters) {
  EXPECT_EQ(Find(WriteAll, 1, SharedBytes<int>(kThreads), 1, false), "");
  EXPECT_THAT(
      Find(WriteAll, 1, SharedBytes<int>(kThreads), 0, false),
      AllOf(HasSubstr("race in shared memory: writes index 0"), HasSubstr("wrote since the last barrier")));
  EXPECT_EQ(Find(WriteAll, 1, SharedBytes<int>(kThreads), 0, true), "");
}

TEST_F(Emulation, FindsAnIndexOutsideItsArray) {
  EXPECT_THAT(
      Find(WriteAll, 1, SharedBytes<int>(kThreads), 2, false),
      AllOf(HasSubstr("out of bounds: index 64 of a shared array of 64"), HasSubstr("thread (32,0,0)")));
  EXPECT_THAT(Find(WriteAll, 1, SharedBytes<int>(kThreads), -1, false),
              HasSubstr("out of bounds: index -1 of a shared array of 64"));
}

TEST_F(Emulation, FindsALaunchWithTooLittleSharedMemory) {
  EXPECT_THAT(Find(WriteAll, 1, SharedBytes<int>(kThreads - 4), 1, false),
              AllOf(HasSubstr("takes 256 bytes at 0"), HasSubstr("asked for 240")));
  EXPECT_THAT(Find(WriteAll, 1, 2 * emulation::kMaxSharedBytes, 1, false), HasSubstr("cannot launch"));
}

// Lanes hand a value on through shared memory.
__global__ void ThroughTheWarp(bool synchronize, int distance) {
  SharedArena arena;
  const Shared<int> tile = arena.Take<int>(kThreads);
  const int me = static_cast<int>(threadIdx.x);
  tile[me] = me;
  if (synchronize) __syncwarp();
  const int other = tile[me ^ distance];
  (void)other;
}

TEST_F(Emulation, AWarpBarrierOrdersAWarpOnly) {
  EXPECT_EQ(Find(ThroughTheWarp, 2, SharedBytes<int>(kThreads), true, 1), "");
  EXPECT_THAT(Find(ThroughTheWarp, 2, SharedBytes<int>(kThreads), false, 1),
              ::testing::AnyOf(HasSubstr("race"), HasSubstr("uninitialised")));
  EXPECT_THAT(Find(ThroughTheWarp, 2, SharedBytes<int>(kThreads), true, 32),
              ::testing::AnyOf(HasSubstr("race"), HasSubstr("uninitialised")));
}

// All read, then one writes.
__global__ void WriteAfterRead(int writer) {
  SharedArena arena;
  const Shared<int> tile = arena.Take<int>(1);
  if (threadIdx.x == 0) tile[0] = 1;
  __syncthreads();
  const int value = tile[0];
  if (static_cast<int>(threadIdx.x) == writer) tile[0] = value + 1;
}

TEST_F(Emulation, FindsAWriteThatOvertakesReads) {
  for (const int writer : {0, 5, 31, 63}) {
    EXPECT_THAT(Find(WriteAfterRead, 2, SharedBytes<int>(1), writer), HasSubstr("race in shared memory"))
        << writer;
  }
}

__global__ void ReadFirst() {
  SharedArena arena;
  const Shared<float> tile = arena.Take<float>(kThreads);
  if (threadIdx.x > 0) tile[static_cast<int>(threadIdx.x)] = 1;
  __syncthreads();
  const float value = tile[0];
  (void)value;
}

TEST_F(Emulation, FindsAReadOfWhatNobodyWrote) {
  EXPECT_THAT(Find(ReadFirst, 2, SharedBytes<float>(kThreads)),
              HasSubstr("uninitialised shared memory: reads index 0"));
}

__global__ void MissingBarrier(int leaver, bool elsewhere) {
  if (static_cast<int>(threadIdx.x) == leaver) {
    if (!elsewhere) return;
    __syncthreads();
  } else {
    __syncthreads();
  }
}

TEST_F(Emulation, FindsABarrierThatAThreadDoesNotReach) {
  EXPECT_EQ(Find(MissingBarrier, 2, 0, -1, false), "");
  for (const int leaver : {0, 17, 63}) {
    EXPECT_THAT(Find(MissingBarrier, 2, 0, leaver, false),
                AllOf(HasSubstr("barrier not reached by all threads"), HasSubstr("has returned"),
                      HasSubstr("emulation_test.cc"), HasSubstr(absl::StrCat("(", leaver, ",0,0)"))));
    EXPECT_THAT(Find(MissingBarrier, 2, 0, leaver, true), HasSubstr("barrier not reached by all threads"));
  }
}

__global__ void MissingLane(int leaver, int* out) {
  const int me = static_cast<int>(threadIdx.x);
  if (me == leaver) return;
  out[me] = __shfl_xor_sync(kWarpMask, me, 3);
}

TEST_F(Emulation, FindsAShuffleThatALaneDoesNotReach) {
  int out[kThreads] = {};
  EXPECT_EQ(Find(MissingLane, 1, 0, -1, out), "");
  for (int i = 0; i < kThreads; ++i) EXPECT_EQ(out[i], i ^ 3);
  EXPECT_THAT(Find(MissingLane, 1, 0, 40, out),
              AllOf(HasSubstr("__shfl"), HasSubstr("thread (40,0,0) has returned")));
}

__global__ void Ballots(unsigned* votes, float* sums, int* shifted) {
  const int me = static_cast<int>(threadIdx.x);
  votes[me] = __ballot_sync(kWarpMask, me % 3 == 0);
  sums[me] = WarpSum(static_cast<float>(me));
  shifted[me] = __shfl_down_sync(kWarpMask, me, 2, 8);
}

TEST_F(Emulation, WarpFunctions) {
  unsigned votes[kThreads];
  float sums[kThreads];
  int shifted[kThreads];
  ASSERT_EQ(Find(Ballots, 1, 0, votes, sums, shifted), "");
  for (int i = 0; i < kThreads; ++i) {
    unsigned expected = 0;
    for (int lane = 0; lane < 32; ++lane) expected |= (i / 32 * 32 + lane) % 3 == 0 ? 1u << lane : 0;
    EXPECT_EQ(votes[i], expected);
    EXPECT_EQ(sums[i], i < 32 ? 496.0f : 1520.0f);
    EXPECT_EQ(shifted[i], i % 8 < 6 ? i + 2 : i);
  }
}

// Copies 16 bytes a thread, and reads its neighbour's. wait, barrier: planted omissions.
__global__ void Asynchronous(const float* in, float* out, bool wait, bool barrier) {
  SharedArena arena;
  const Shared<float> tile = arena.Take<float>(4 * kThreads);
  const int me = static_cast<int>(threadIdx.x);
  CpAsync16(tile, 4 * me, in + 4 * me, me != 7);
  CpAsyncCommit();
  if (wait) CpAsyncWait<0>();
  if (barrier) __syncthreads();
  const float4 got = tile.LoadAs<float4>((4 * me + 4) % (4 * kThreads));
  out[me] = got.y;
}

TEST_F(Emulation, AsynchronousCopiesArriveAtTheWait) {
  float in[4 * kThreads], out[kThreads];
  for (int i = 0; i < 4 * kThreads; ++i) in[i] = static_cast<float>(i);
  const size_t bytes = SharedBytes<float>(4 * kThreads);
  ASSERT_EQ(Find(Asynchronous, 1, bytes, in, out, true, true), "");
  for (int i = 0; i < kThreads; ++i) EXPECT_EQ(out[i], i == 6 ? 0.0f : (4.0f * i + 5) - (i == 63 ? 256 : 0));
  EXPECT_NE(Find(Asynchronous, 1, bytes, in, out, true, false), "");
  ASSERT_EQ(Find(Asynchronous, 1, bytes, in, out, false, true), "");
  for (int i = 0; i < kThreads; ++i) EXPECT_TRUE(std::isnan(out[i])) << i;
}

// One warp: c = a·b, fragments loaded as the comment of MmaBF16() says, and by ldmatrix.
__global__ void Multiply(const float* a, const float* b, float* c, bool by_ldmatrix) {
  SharedArena arena;
  const Shared<uint16_t> as = arena.Take<uint16_t>(16 * 16);
  const Shared<uint16_t> bs = arena.Take<uint16_t>(16 * 8);  // [k, column]
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  if (threadIdx.x < 32) {
    for (int i = lane; i < 256; i += 32) as[i] = FloatToBF16(a[i]);
    for (int i = lane; i < 128; i += 32) bs[i] = FloatToBF16(b[i]);
  }
  __syncthreads();
  uint32_t fa[4], fb[4];
  if (by_ldmatrix) {
    LdMatrix4(fa, as, (lane % 8 + lane / 8 % 2 * 8) * 16 + lane / 16 * 8);
    LdMatrix4Transposed(fb, bs, lane % 16 * 8);
  } else {
    const auto pair = [](uint16_t low, uint16_t high) {
      return static_cast<uint32_t>(low) | uint32_t{high} << 16;
    };
    for (int i = 0; i < 4; ++i) {
      const int at = (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
      fa[i] = pair(as[at], as[at + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      const int k = 2 * t + i * 8;
      fb[i] = pair(bs[k * 8 + g], bs[(k + 1) * 8 + g]);
    }
  }
  float sums[4] = {1, 1, 1, 1};
  MmaBF16(sums, fa, {fb[0], fb[1]});
  for (int i = 0; i < 4; ++i) {
    if (threadIdx.x < 32) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
  }
}

TEST_F(Emulation, TensorCoreFragments) {
  float a[256], b[128], c[128];
  for (int i = 0; i < 256; ++i) a[i] = static_cast<float>((i * 37) % 17 - 8);
  for (int i = 0; i < 128; ++i) b[i] = static_cast<float>((i * 53) % 13 - 6);
  for (const bool by_ldmatrix : {false, true}) {
    ASSERT_EQ(Find(Multiply, 1, 512 + 256, a, b, c, by_ldmatrix), "");
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        float sum = 1;
        for (int k = 0; k < 16; ++k) sum += a[row * 16 + k] * b[k * 8 + column];
        EXPECT_EQ(c[row * 8 + column], sum) << row << "," << column;
      }
    }
  }
}

// A step of TreeSum of `in`.
cudaError_t SumStep(StepGraph& graph, const float* in, float* out, int skip) {
  graph.Begin(3);
  const cudaError_t error = Launch("TreeSum", TreeSum, dim3(3), dim3(kThreads), SharedBytes<float>(kThreads),
                                   Stream(nullptr, &graph), in, out, skip);
  return error == cudaSuccess ? graph.Launch(nullptr) : error;
}

TEST_F(Emulation, GraphsRunWhatTheyWereMadeOfLast) {
  StepGraph graph;
  const emulation::Counts before = emulation::Counted();
  ASSERT_EQ(SumStep(graph, in_, out_, -1), cudaSuccess);
  EXPECT_THAT(out_, ::testing::ElementsAre(2016, 6112, 10208));
  for (float& x : in_) x += 1;
  ASSERT_EQ(SumStep(graph, in_, out_, -1), cudaSuccess);
  EXPECT_THAT(out_, ::testing::ElementsAre(2080, 6176, 10272));
  EXPECT_EQ(emulation::Counted().nodes_set, before.nodes_set);
  float other[3] = {};
  ASSERT_EQ(SumStep(graph, in_, other, -1), cudaSuccess);
  EXPECT_THAT(other, ::testing::ElementsAre(2080, 6176, 10272));
  EXPECT_EQ(emulation::Counted().nodes_set, before.nodes_set + 1);
  EXPECT_EQ(emulation::Counted().graphs, before.graphs + 1);
  EXPECT_EQ(emulation::Counted().graph_launches, before.graph_launches + 3);
  EXPECT_EQ(emulation::Counted().kernels, before.kernels);
  // What was kept and dropped is not launched.
  graph.Begin(3);
  graph.Drop();
  EXPECT_EQ(graph.Launch(nullptr), cudaSuccess);
  EXPECT_EQ(emulation::Counted().graph_launches, before.graph_launches + 3);
}

TEST_F(Emulation, AFindingInAGraphShowsAtTheNextSynchronization) {
  StepGraph graph;
  ASSERT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
  EXPECT_EQ(SumStep(graph, in_, out_, 0), cudaSuccess);
  const cudaError_t error = cudaStreamSynchronize(nullptr);
  EXPECT_THAT(std::string(cudaGetErrorString(error)),
              AllOf(HasSubstr("kernel TreeSum, block (2,0,0), thread ("), HasSubstr("index")));
  EXPECT_NE(SumStep(graph, in_, out_, -1), cudaSuccess);  // it stays with the process, as on a device
  emulation::ForgetError();
  EXPECT_EQ(SumStep(graph, in_, out_, -1), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
}

TEST_F(Emulation, GraphsRefuseWhatADriverWould) {
  DeclareKernel("TreeSum", TreeSum);
  const float* in = in_;
  float* out = out_;
  int skip = -1;
  void* arguments[] = {&in, &out, &skip};
  cudaKernelNodeParams params = {reinterpret_cast<void*>(TreeSum), dim3(3),   dim3(kThreads),
                                 SharedBytes<float>(kThreads),     arguments, nullptr};
  cudaGraph_t graph, other;
  cudaGraphNode_t first, second, of_other;
  ASSERT_EQ(cudaGraphCreate(&graph, 0), cudaSuccess);
  ASSERT_EQ(cudaGraphCreate(&other, 0), cudaSuccess);
  ASSERT_EQ(cudaGraphAddKernelNode(&first, graph, nullptr, 0, &params), cudaSuccess);
  ASSERT_EQ(cudaGraphAddKernelNode(&of_other, other, nullptr, 0, &params), cudaSuccess);
  // Two nodes that could run at once: a kernel here reads what the last one wrote.
  EXPECT_NE(cudaGraphAddKernelNode(&second, graph, nullptr, 0, &params), cudaSuccess);
  cudaGraphExec_t executable;
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  EXPECT_EQ(cudaGraphExecKernelNodeSetParams(executable, first, &params), cudaSuccess);
  EXPECT_NE(cudaGraphExecKernelNodeSetParams(executable, of_other, &params), cudaSuccess);
  params.func = &params;  // no kernel
  EXPECT_NE(cudaGraphExecKernelNodeSetParams(executable, first, &params), cudaSuccess);
  // The executable has its own copy of the arguments.
  in = nullptr, out = nullptr;
  EXPECT_EQ(cudaGraphLaunch(executable, nullptr), cudaSuccess);
  EXPECT_THAT(out_, ::testing::ElementsAre(2016, 6112, 10208));
  EXPECT_EQ(cudaGraphExecDestroy(executable), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(other), cudaSuccess);
  // More shared memory than every kernel has is to be asked for first.
  in = in_, out = out_;
  EXPECT_NE(cudaLaunchKernel(reinterpret_cast<void*>(TreeSum), dim3(3), dim3(kThreads), arguments, 50 << 10,
                             nullptr),
            cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
}

TEST(SizeClass, IsTheNextOfFourSizesPerPowerOfTwo) {
  const std::pair<size_t, size_t> sizes[] = {{0, 256},     {1, 256},     {256, 256},   {257, 512},
                                             {1024, 1024}, {1025, 1280}, {1792, 1792}, {1793, 2048},
                                             {4097, 5120}, {8191, 8192}, {8193, 10240}};
  for (const auto& [size, expected] : sizes) EXPECT_EQ(SizeClass(size), expected) << size;
}

}  // namespace
}  // namespace atp::cuda
