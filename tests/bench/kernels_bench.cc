// How fast each op of the cpu backend is on this machine, as one JSON object. kernels_bench [isa] [threads]
//
// "gflops" counts 2 per multiply-add. "gbps" counts the weights or cache entries that an op must read once.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend_factory.h"

namespace atp {
namespace {

using Clock = std::chrono::steady_clock;

class Report {
 public:
  // Runs `body` for about 0.3 s and prints the best time of a call: the machine may have other guests.
  template <class Body>
  void Measure(const std::string& op, double multiply_adds, double bytes, const Body& body) {
    body();
    double best = 1e30;
    const Clock::time_point begin = Clock::now();
    do {
      const Clock::time_point start = Clock::now();
      body();
      best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
    } while (Clock::now() - begin < std::chrono::milliseconds(300));
    std::printf("%s\n  {\"op\": \"%s\", \"microseconds\": %.2f, \"gflops\": %.1f, \"gbps\": %.2f}",
                separator_, op.c_str(), best * 1e6, 2 * multiply_adds / best * 1e-9, bytes / best * 1e-9);
    separator_ = ",";
  }

 private:
  const char* separator_ = "";
};

std::vector<float> Normals(size_t count) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0.0f, 0.05f);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

void MeasureMatMul(Backend& backend, Report& report) {
  const int64_t in = 2048, out = 2048;
  const std::vector<float> wide = Normals(in * out);
  std::vector<uint16_t> narrow(wide.size());
  for (size_t i = 0; i < wide.size(); ++i) narrow[i] = FloatToBF16(wide[i]);
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    // As fp16 the bits of a bf16 number are another number: still a finite one of a sane size.
    const void* data = dtype == DType::kF32 ? static_cast<const void*>(wide.data()) : narrow.data();
    const TensorView weight{data, dtype, out, in};
    for (const int64_t rows : {1, 4, 8, 16, 64, 256, 512}) {
      const std::vector<float> x = Normals(rows * in);
      std::vector<float> y(rows * out);
      report.Measure("matmul " + std::string(Name(dtype)) + " rows " + std::to_string(rows) + " 2048x2048",
                     static_cast<double>(rows) * in * out, static_cast<double>(weight.bytes()), [&] {
                       backend.MatMul({x.data(), weight, nullptr, y.data(), rows, false});
                     });
    }
  }
}

// `sequences` of `rows` rows each, at the end of `context` entries.
void MeasureAttention(Backend& backend, Report& report, KvFormat format, int sequences, int rows,
                      int context) {
  const int kv_heads = 8, group = 4, head_dim = 64, heads = kv_heads * group;
  const KvPage page(format, 16, head_dim, false);
  const int blocks_per_head = (context + 15) / 16;
  const size_t blocks = static_cast<size_t>(sequences) * kv_heads * blocks_per_head;
  std::vector<std::byte> pool(blocks * page.bytes());
  std::vector<BlockId> ids(blocks);
  for (size_t i = 0; i < blocks; ++i) ids[i] = static_cast<BlockId>(i);
  std::vector<KvHeadBlocks> tables(static_cast<size_t>(sequences) * kv_heads);
  for (size_t i = 0; i < tables.size(); ++i) tables[i].exact = ids.data() + i * blocks_per_head;
  std::vector<KvSequence> list;
  for (int s = 0; s < sequences; ++s) {
    list.push_back({s * rows, rows, context, tables.data() + static_cast<size_t>(s) * kv_heads});
  }
  const std::vector<float> query = Normals(static_cast<size_t>(sequences) * rows * heads * head_dim);
  std::vector<float> out(query.size());
  const KvPool kv{pool.data(), page.bytes(), &page};
  const double visible = static_cast<double>(rows) * context - rows * (rows - 1) / 2.0;
  report.Measure("attention " + std::string(Name(format)) + " sequences " + std::to_string(sequences) +
                     " rows " + std::to_string(rows) + " context " + std::to_string(context),
                 2 * visible * sequences * heads * head_dim, static_cast<double>(pool.size()), [&] {
                   backend.Attention({query.data(), out.data(), list, kv, heads, kv_heads, 0.125f});
                 });
}

void MeasureRowwise(Backend& backend, Report& report, int64_t rows) {
  const int64_t dim = 2048;
  const std::vector<float> x = Normals(rows * dim);
  std::vector<float> y(x);
  const std::vector<float> frequency(32, 0.1f);
  const std::string suffix = " rows " + std::to_string(rows) + " dim 2048";
  const double bytes = static_cast<double>(rows) * dim * sizeof(float);
  report.Measure("rms_norm" + suffix, 0, bytes, [&] {
    backend.RmsNorm({x.data(), x.data(), y.data(), rows, dim, 1e-5f});
  });
  report.Measure("swiglu" + suffix, 0, 2 * bytes, [&] {
    backend.SwiGlu({x.data(), x.data(), y.data(), rows, dim});
  });
  std::vector<int32_t> positions(rows);
  for (int64_t i = 0; i < rows; ++i) positions[i] = static_cast<int32_t>(i);
  report.Measure("rope, angles known" + suffix, 0, bytes, [&] {
    backend.Rope({y.data(), positions, frequency.data(), 32, 64});
  });
  report.Measure("rope, new angles" + suffix, 0, bytes, [&] {
    ++positions[0];
    backend.Rope({y.data(), positions, frequency.data(), 32, 64});
  });
}

int Main(int argc, char** argv) {
  BackendOptions options;
  if (argc > 1) options.cpu_isa = argv[1];
  if (argc > 2) options.threads = std::atoi(argv[2]);
  const auto backend = MakeBackend(options);
  if (!backend.ok()) {
    std::fprintf(stderr, "%s\n", backend.status().ToString().c_str());
    return 2;
  }
  std::printf("{\"backend\": \"%s\", \"rows\": [", (*backend)->Description().c_str());
  Report report;
  MeasureMatMul(**backend, report);
  for (const KvFormat format : {KvFormat::kF32, KvFormat::kBF16}) {
    MeasureAttention(**backend, report, format, 1, 1, 4096);
    MeasureAttention(**backend, report, format, 8, 1, 1024);
    MeasureAttention(**backend, report, format, 1, 512, 512);
  }
  for (const int64_t rows : {1, 256}) MeasureRowwise(**backend, report, rows);
  std::printf("\n]}\n");
  return 0;
}

}  // namespace
}  // namespace atp

int main(int argc, char** argv) { return atp::Main(argc, argv); }
