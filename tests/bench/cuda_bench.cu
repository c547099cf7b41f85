// What the CUDA kernels reach at the shapes of an 8B model (32 query heads, 8 kv heads, head_dim 128): decode
// attention, prefill attention, the principal fit and matrix products, beside the device's copy bandwidth.
// JSON. Each op is captured as a CUDA graph and replayed: the times are the device's, tables included;
// issue_us is the host's.
//   cuda_bench [decode] [prefill] [fit] [matmul]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/weight_planes.h"

namespace atp::cuda {
namespace {

constexpr int kHeads = 32, kKvHeads = 8, kGroup = kHeads / kKvHeads, kDim = 128, kTokens = 16;
constexpr int kReplays = 21;
constexpr size_t kWorkspaceBytes = size_t{256} << 20;  // what a server reserves for fits

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Sane bf16 everywhere, whatever it is read as: magnitudes between 1/2 and 2.
__global__ void Fill(uint32_t* words, size_t count) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u;
    x ^= x >> 15, x *= 2246822519u, x ^= x >> 13;
    words[i] = (x & 0x80ff80ffu) | 0x3f003f00u;
  }
}

struct Memory {
  explicit Memory(size_t bytes) {
    if (cudaMalloc(&data, bytes) != cudaSuccess) {
      cudaGetLastError();
      data = nullptr;
      return;
    }
    Fill<<<1024, 256>>>(static_cast<uint32_t*>(data), bytes / 4);
    Check(cudaDeviceSynchronize(), "fill");
  }
  ~Memory() { cudaFree(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data = nullptr;
};

struct Time {
  double device_us, issue_us;
};

class Device {
 public:
  Device() {
    cudaDeviceProp properties;
    Check(cudaGetDeviceProperties(&properties, 0), "device");
    Check(cudaStreamCreate(&stream_), "stream");
    name_ = properties.name;
    context_ = {stream_,
                properties.multiProcessorCount,
                properties.major * 10 + properties.minor,
                properties.sharedMemPerBlockOptin,
                &staging_,
                &workspace_};
    cudaError_t error;
    workspace_.Reserve(kWorkspaceBytes, &error);  // as a server has: fits run as many at once as find room
    Check(error, "workspace");
    workspace_.Reset();
  }

  const std::string& name() const { return name_; }
  const OpContext& context() const { return context_; }

  // Median over replays.
  Time Measure(const std::function<cudaError_t()>& op) {
    Check(op(), "op");  // grows workspace and staging
    Check(staging_.Fetch(stream_), "op");
    Check(cudaStreamSynchronize(stream_), "op");
    staging_.Reset();
    const auto begin = std::chrono::steady_clock::now();
    Check(op(), "op");
    const double issue =
        std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
    Check(cudaStreamSynchronize(stream_), "op");
    staging_.Reset();
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    Check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
    Check(op(), "op");
    Check(cudaStreamEndCapture(stream_, &graph), "capture");
    Check(cudaGraphInstantiate(&exec, graph, 0), "graph");
    cudaEvent_t start, stop;
    Check(cudaEventCreate(&start), "event");
    Check(cudaEventCreate(&stop), "event");
    std::vector<float> times;
    for (int i = 0; i < kReplays + 3; ++i) {
      Check(cudaEventRecord(start, stream_), "event");
      Check(cudaGraphLaunch(exec, stream_), "graph");
      Check(cudaEventRecord(stop, stream_), "event");
      Check(cudaStreamSynchronize(stream_), "replay");
      float ms;
      Check(cudaEventElapsedTime(&ms, start, stop), "event");
      if (i >= 3) times.push_back(ms);
    }
    cudaEventDestroy(start), cudaEventDestroy(stop);
    cudaGraphExecDestroy(exec), cudaGraphDestroy(graph);
    Check(staging_.Fetch(stream_), "op");  // what the last replay has written
    Check(cudaStreamSynchronize(stream_), "op");
    staging_.Reset();
    std::nth_element(times.begin(), times.begin() + kReplays / 2, times.end());
    return {times[kReplays / 2] * 1e3, issue};
  }

  // GB/s, counting bytes read and bytes written.
  double CopyBandwidth() {
    constexpr size_t kBytes = size_t{2} << 30;
    Memory from(kBytes), to(kBytes);
    const Time time = Measure(
        [&] { return cudaMemcpyAsync(to.data, from.data, kBytes, cudaMemcpyDeviceToDevice, stream_); });
    return 2.0 * kBytes / time.device_us * 1e-3;
  }

 private:
  cudaStream_t stream_ = nullptr;
  std::string name_;
  Staging staging_;
  Workspace workspace_;
  OpContext context_;
};

const char* separator = "";
template <class... Values>
void Row(const char* format, Values... values) {
  std::printf("%s\n    ", separator);
  std::printf(format, values...);
  separator = ",";
  std::fflush(stdout);
}

// Sequences of one layer whose blocks lie anywhere in the pool.
class Cache {
 public:
  // Per head: `principal` entries in `format`, `exact` tokens in bf16.
  Cache(int batch, int rows, int exact, int principal, KvFormat format)
      : exact_page_(KvFormat::kBF16, kTokens, kDim, false),
        page_(format, kTokens * 16 / BitsOf(format), kDim, true),
        block_bytes_(std::max(exact_page_.bytes(), page_.bytes())) {
    const int exact_blocks = CeilDiv(exact, kTokens),
              blocks = exact_blocks + CeilDiv(principal, page_.entries());
    const size_t count = static_cast<size_t>(batch) * kKvHeads * static_cast<size_t>(blocks);
    bytes_ = static_cast<double>(batch) * kKvHeads *
             (exact * 2.0 * kDim * 2 + principal * static_cast<double>(page_.bytes()) / page_.entries());
    ids_.resize(count);
    std::iota(ids_.begin(), ids_.end(), 0);
    std::shuffle(ids_.begin(), ids_.end(), std::mt19937(1));
    memory_ = std::make_unique<Memory>(count * block_bytes_);
    const size_t floats = static_cast<size_t>(batch) * static_cast<size_t>(rows) * kHeads * kDim;
    query_ = std::make_unique<Memory>(floats * sizeof(float));
    out_ = std::make_unique<Memory>(floats * sizeof(float));
    for (int s = 0; s < batch; ++s) {
      auto& heads = heads_.emplace_back(kKvHeads);
      for (int h = 0; h < kKvHeads; ++h) {
        const BlockId* first = &ids_[(static_cast<size_t>(s) * kKvHeads + h) * static_cast<size_t>(blocks)];
        heads[h] = {first, first + exact_blocks, principal, &page_};
      }
      sequences_.push_back({s * rows, rows, exact, heads.data()});
    }
  }

  bool fits() const { return memory_->data != nullptr && query_->data != nullptr && out_->data != nullptr; }
  double bytes() const { return bytes_; }
  Time Attend(Device& device) {
    const AttentionArgs args{static_cast<const float*>(query_->data),
                             static_cast<float*>(out_->data),
                             sequences_,
                             {static_cast<std::byte*>(memory_->data), block_bytes_, &exact_page_},
                             kHeads,
                             kKvHeads,
                             1 / std::sqrt(static_cast<float>(kDim))};
    return device.Measure([&] { return Attention(device.context(), args); });
  }

 private:
  KvPage exact_page_, page_;
  size_t block_bytes_;
  double bytes_;
  std::vector<BlockId> ids_;
  std::unique_ptr<Memory> memory_, query_, out_;
  std::vector<std::vector<KvHeadBlocks>> heads_;
  std::vector<KvSequence> sequences_;
};

void Decode(Device& device, double copy) {
  struct Case {
    const char* name;
    double ratio;
    KvFormat format;
  };
  constexpr int kWindow = 512;  // tokens that stay exact in compressed cases
  for (const int context : {4096, 32768, 131072}) {
    for (const int batch : {1, 16, 64}) {
      double exact_us = 0;
      for (const Case c : {Case{"exact bf16", 0, KvFormat::kBF16}, Case{"1/4 bf16", 0.25, KvFormat::kBF16},
                           Case{"1/2 int4", 0.5, KvFormat::kInt4}}) {
        const int principal = static_cast<int>((context - kWindow) * c.ratio);
        Cache cache(batch, 1, c.ratio > 0 ? kWindow : context, principal, c.format);
        if (!cache.fits()) {
          Row("{\"op\":\"decode\",\"cache\":\"%s\",\"batch\":%d,\"context\":%d,\"skipped\":\"out of "
              "memory\"}",
              c.name, batch, context);
          continue;
        }
        const Time time = cache.Attend(device);
        if (c.ratio == 0) exact_us = time.device_us;
        const double rate = cache.bytes() / time.device_us * 1e-3;
        Row("{\"op\":\"decode\",\"cache\":\"%s\",\"batch\":%d,\"context\":%d,\"us\":%.1f,\"issue_us\":%.1f,"
            "\"gb_per_s\":%.0f,\"of_copy\":%.3f,\"of_exact_time\":%.3f}",
            c.name, batch, context, time.device_us, time.issue_us, rate, rate / copy,
            exact_us > 0 ? time.device_us / exact_us : 0.0);
      }
    }
  }
}

void Prefill(Device& device) {
  for (const int context : {8192, 32768}) {
    Cache cache(1, context, context, 0, KvFormat::kBF16);
    if (!cache.fits()) continue;
    const Time time = cache.Attend(device);
    // Two products of a multiplication and an addition each, over half of the square.
    const double flops = 2.0 * 2.0 * kHeads * kDim * (0.5 * context * (context + 1.0));
    Row("{\"op\":\"prefill\",\"context\":%d,\"us\":%.1f,\"issue_us\":%.1f,\"tflops\":%.1f}", context,
        time.device_us, time.issue_us, flops / time.device_us * 1e-6);
  }
}

// Segments of 256 tokens, 64 kept queries per head.
void Fit(Device& device) {
  constexpr int kSegment = 256, kSamples = 64;
  for (const int segments : {1, 8, 32}) {
    for (const int count : {64, 128}) {
      const KvPage exact(KvFormat::kBF16, kTokens, kDim, false), page(KvFormat::kBF16, kTokens, kDim, true);
      const size_t block_bytes = page.bytes();
      const QueryPage queries(block_bytes, kSamples, kDim);
      const int exact_blocks = kSegment / kTokens, out_blocks = count / kTokens;
      const int query_blocks = kGroup * queries.blocks_per_head(),
                per_job = exact_blocks + out_blocks + query_blocks;
      const int jobs = segments * kKvHeads;
      const Memory pool(static_cast<size_t>(jobs) * static_cast<size_t>(per_job) * block_bytes);
      std::vector<BlockId> ids(static_cast<size_t>(jobs) * static_cast<size_t>(per_job));
      std::iota(ids.begin(), ids.end(), 0);
      std::vector<int32_t> positions(kGroup * kSamples);
      for (size_t i = 0; i < positions.size(); ++i)
        positions[i] = static_cast<int32_t>(kSegment + 37 * i % 4096);
      std::vector<float> frequency(kDim / 2);
      for (int i = 0; i < kDim / 2; ++i) frequency[i] = std::pow(500000.0f, -2.0f * i / kDim);
      const Memory device_frequency(frequency.size() * sizeof(float));
      Check(cudaMemcpy(device_frequency.data, frequency.data(), frequency.size() * sizeof(float),
                       cudaMemcpyHostToDevice),
            "copy");
      std::vector<PrincipalFitJob> work;
      for (int j = 0; j < jobs; ++j) {
        const BlockId* first = &ids[static_cast<size_t>(j) * static_cast<size_t>(per_job)];
        work.push_back({nullptr, 0, first, kSegment, first + exact_blocks + out_blocks, positions.data(),
                        kSamples, 4, count, first + exact_blocks, &page});
      }
      std::vector<PrincipalFitReport> reports(work.size());
      const FitPrincipalKeysArgs args{work,
                                      reports,
                                      {static_cast<std::byte*>(pool.data), block_bytes, &exact},
                                      &queries,
                                      static_cast<const float*>(device_frequency.data),
                                      kGroup};
      const Time time = device.Measure([&] { return FitPrincipalKeys(device.context(), args); });
      Row("{\"op\":\"fit\",\"segments\":%d,\"jobs\":%d,\"count\":%d,\"us\":%.1f,\"issue_us\":%.1f,\"us_per_"
          "job\":%.2f,"
          "\"fitted\":%s}",
          segments, jobs, count, time.device_us, time.issue_us, time.device_us / jobs,
          reports[0].fitted ? "true" : "false");
    }
  }
}

// One weight matrix of an 8B model's feed-forward layer; several, so that none is still in the cache.
void MatMul(Device& device, double copy) {
  constexpr int64_t kIn = 4096, kOut = 14336, kWeights = 8;
  for (const DType dtype :
       {DType::kBF16, DType::kQ8_0, DType::kQ4_0, DType::kQ4, DType::kQ4_K, DType::kQ5_K, DType::kQ6_K}) {
    const size_t bytes = IsQuantized(dtype) ? PlaneBytes(dtype, kIn * kOut).total() : kIn * kOut * 2;
    const Memory weights(bytes * kWeights);
    for (const int rows : {1, 8, 16, 32, 256, 2048}) {
      const auto floats = [rows](int64_t width) { return static_cast<size_t>(rows * width) * sizeof(float); };
      const Memory x(floats(kIn)), y(floats(kOut));
      if (weights.data == nullptr || x.data == nullptr || y.data == nullptr) continue;
      const Time time = device.Measure([&] {
        cudaError_t error = cudaSuccess;
        for (int w = 0; w < kWeights && error == cudaSuccess; ++w) {
          const std::byte* weight = static_cast<const std::byte*>(weights.data) + w * bytes;
          const MatMulArgs args{static_cast<const float*>(x.data),
                                {weight, dtype, kOut, kIn, IsQuantized(dtype)},
                                nullptr,
                                static_cast<float*>(y.data),
                                rows,
                                false};
          error = MatMuls(device.context(), {&args, 1});
        }
        return error;
      });
      const double us = time.device_us / kWeights, rate = static_cast<double>(bytes) / us * 1e-3;
      Row("{\"op\":\"matmul\",\"weights\":\"%s\",\"rows\":%d,\"in\":%d,\"out\":%d,\"us\":%.1f,\"gb_per_s\":%."
          "0f,\"of_copy\":%.3f,\"tflops\":%.1f}",
          Name(dtype).data(), rows, static_cast<int>(kIn), static_cast<int>(kOut), us, rate, rate / copy,
          2.0 * rows * kIn * kOut / us * 1e-6);
    }
  }
}

int Main(int argc, char** argv) {
  const auto wanted = [&](const char* what) {
    return argc == 1 ||
           std::any_of(argv + 1, argv + argc, [&](const char* arg) { return std::string(arg) == what; });
  };
  Device device;
  const double copy = device.CopyBandwidth();
  std::printf("{\"device\":\"%s\",\"copy_gb_per_s\":%.0f,\"rows\":[", device.name().c_str(), copy);
  if (wanted("decode")) Decode(device, copy);
  if (wanted("prefill")) Prefill(device);
  if (wanted("fit")) Fit(device);
  if (wanted("matmul")) MatMul(device, copy);
  std::printf("\n]}\n");
  return 0;
}

}  // namespace
}  // namespace atp::cuda

int main(int argc, char** argv) { return atp::cuda::Main(argc, argv); }
