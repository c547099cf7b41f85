// How fast each op of the cpu backend is on this machine, as one JSON object. kernels_bench [isa] [threads]
// [matmul|others]
//
// "gflops" counts 2 per multiply-add. "gbps" counts the weights or cache entries that an op must read once.
// "fraction" is of the roofline: of the machine's peak for that arithmetic, or of its read bandwidth,
// whichever would take longer.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend_factory.h"
#include "kernels/cpu/cores.h"
#include "kernels/quantized.h"
#include "tests/bench/machine_peaks.h"

namespace atp {
namespace {

using Clock = std::chrono::steady_clock;

class Report {
 public:
  // Runs `body` for about 0.1 s and prints the best time of a call: the machine may have other guests.
  template <class Body>
  void Measure(const std::string& op, double multiply_adds, double bytes, const Body& body) {
    Measure(op, multiply_adds, bytes, 0, 0, body);
  }

  // peak_gflops, peak_gbps: what "fraction" is of; 0: nothing.
  template <class Body>
  void Measure(const std::string& op, double multiply_adds, double bytes, double peak_gflops,
               double peak_gbps, const Body& body) {
    body();
    double best = 1e30;
    const Clock::time_point begin = Clock::now();
    do {
      const Clock::time_point start = Clock::now();
      body();
      best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
    } while (Clock::now() - begin < std::chrono::milliseconds(80));
    std::printf("%s\n  {\"op\": \"%s\", \"microseconds\": %.2f, \"gflops\": %.1f, \"gbps\": %.2f", separator_,
                op.c_str(), best * 1e6, 2 * multiply_adds / best * 1e-9, bytes / best * 1e-9);
    const double computing = peak_gflops > 0 ? 2 * multiply_adds / peak_gflops * 1e-9 : 0;
    const double reading = peak_gbps > 0 ? bytes / peak_gbps * 1e-9 : 0;
    if (computing + reading > 0) std::printf(", \"fraction\": %.3f", std::max(computing, reading) / best);
    std::printf("}");
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

std::vector<std::byte> RandomWeights(DType dtype, int64_t out, int64_t in) {
  const std::vector<float> values = Normals(static_cast<size_t>(in));
  std::vector<std::byte> bytes(static_cast<size_t>(out) * RowBytes(dtype, in));
  if (CanQuantizeTo(dtype)) {
    const size_t row = RowBytes(dtype, in);
    QuantizeRow(dtype, values.data(), in, bytes.data());
    for (int64_t o = 1; o < out; ++o)
      std::copy_n(bytes.data(), row, bytes.data() + static_cast<size_t>(o) * row);
    return bytes;
  }
  std::mt19937 random(1);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  const auto size = static_cast<size_t>(BlockOf(dtype).bytes);
  const uint16_t scale = FloatToF16(0.001f);
  for (size_t at = 0; at < bytes.size(); at += size) {
    std::memcpy(bytes.data() + at + (dtype == DType::kQ6_K ? 208 : 0), &scale, sizeof(scale));
    if (dtype != DType::kQ6_K) std::memcpy(bytes.data() + at + 2, &scale, sizeof(scale));
  }
  return bytes;
}

// The matrices of a 1.1B model, from small to large, and the head. Random bits will do as weights: all but
// their scales are integers, and those are set.
// tiles: the backend uses AMX where it helps.
void MeasureMatMul(Backend& backend, Report& report, const MachinePeaks& peaks, bool bf16_dot, bool tiles) {
  struct Shape {
    int64_t out, in;
  };
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kQ8_0, DType::kQ4_0, DType::kQ4,
                            DType::kQ4_K, DType::kQ5_K, DType::kQ6_K}) {
    if (bf16_dot && dtype != DType::kBF16) continue;
    for (const Shape shape : {Shape{256, 2048}, {2048, 2048}, {5632, 2048}, {2048, 5632}, {32000, 2048}}) {
      // Enough copies that no cache holds them, as in a model.
      const std::vector<std::byte> bytes = RandomWeights(dtype, shape.out, shape.in);
      const size_t copies = std::max<size_t>(1, (size_t{192} << 20) / bytes.size());
      std::vector<Weight> weights;
      for (size_t i = 0; i < copies; ++i) {
        weights.push_back(*backend.LoadWeight({bytes.data(), dtype, shape.out, shape.in}, dtype));
      }
      const double int8 = tiles ? peaks.int8_tiles : peaks.int8, bf16 = tiles ? peaks.bf16_tiles : peaks.bf16;
      const double peak = IsQuantized(dtype) ? int8 : bf16_dot ? bf16 : peaks.fp32;
      for (const int64_t rows : {1, 2, 4, 8, 16, 32, 128, 512}) {
        if (rows > 32 && shape.out == 32000) continue;  // a prompt needs the head for its last token only
        const std::vector<float> values = Normals(static_cast<size_t>(rows * shape.in));
        // As a model's: aligned, so that a vector of y is one line of the cache.
        const Buffer x = *backend.Allocate(values.size() * sizeof(float));
        backend.CopyToDevice(x.data(), values.data(), x.bytes());
        const Buffer y = *backend.Allocate(static_cast<size_t>(rows * shape.out) * sizeof(float));
        size_t turn = 0;
        const std::string name = "matmul " + std::string(Name(dtype)) + (bf16_dot ? " x bf16" : "") +
                                 " rows " + std::to_string(rows) + " " + std::to_string(shape.out) + "x" +
                                 std::to_string(shape.in);
        report.Measure(name, static_cast<double>(rows) * shape.out * shape.in,
                       static_cast<double>(bytes.size()), peak, peaks.read, [&] {
                         const Weight& weight = weights[turn++ % weights.size()];
                         backend.MatMul({x.as<float>(), weight.view, nullptr, y.as<float>(), rows, false});
                       });
      }
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
  const std::string only = argc > 3 ? argv[3] : "";
  const auto backend = MakeBackend(options);
  if (!backend.ok()) {
    std::fprintf(stderr, "%s\n", backend.status().ToString().c_str());
    return 2;
  }
  const int threads = options.threads > 0 ? options.threads : cpu::GrantedCores();
  const MachinePeaks peaks = MeasurePeaks(threads);
  const std::time_t now = std::time(nullptr);
  char date[16];
  std::strftime(date, sizeof(date), "%Y-%m-%d", std::gmtime(&now));
  std::string command = "kernels_bench";
  for (int i = 1; i < argc; ++i) command += std::string(" ") + argv[i];
  std::printf("{\"command\": \"%s\",\n ", command.c_str());
  std::printf(
      "\"date\": \"%s\", \"machine\": \"%s\", \"backend\": \"%s\", \"threads\": %d,\n"
      " \"peaks\": {\"fp32_gflops\": %.0f, \"bf16_gflops\": %.0f, \"int8_gops\": %.0f, "
      "\"bf16_tiles_gflops\": %.0f, \"int8_tiles_gops\": %.0f, \"read_gbps\": %.1f},\n"
      " \"rows\": [",
      date, CpuModel().c_str(), (*backend)->Description().c_str(), threads, peaks.fp32, peaks.bf16,
      peaks.int8, peaks.bf16_tiles, peaks.int8_tiles, peaks.read);
  Report report;
  if (only.empty() || only == "matmul") {
    const bool tiles = options.cpu_isa == "amx" || (options.cpu_isa == "auto" && peaks.bf16_tiles > 0);
    MeasureMatMul(**backend, report, peaks, false, tiles);
    options.activation_dtype = DType::kBF16;
    if (peaks.bf16 > 0) MeasureMatMul(**MakeBackend(options), report, peaks, true, tiles);
  }
  if (only.empty() || only == "others") {
    for (const KvFormat format : {KvFormat::kF32, KvFormat::kBF16}) {
      MeasureAttention(**backend, report, format, 1, 1, 4096);
      MeasureAttention(**backend, report, format, 8, 1, 1024);
      MeasureAttention(**backend, report, format, 1, 512, 512);
    }
    for (const int64_t rows : {1, 256}) MeasureRowwise(**backend, report, rows);
  }
  std::printf("\n]}\n");
  return 0;
}

}  // namespace
}  // namespace atp

int main(int argc, char** argv) { return atp::Main(argc, argv); }
