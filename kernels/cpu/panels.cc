#include "kernels/cpu/panels.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/host_memory.h"
#include "kernels/quantized.h"

namespace atp::cpu {
namespace {

constexpr size_t kUnit = 64;

// What a panel keeps of one block of 32 columns, and of 256.
struct SectionBytes {
  size_t super, scales, quants, high;
};

SectionBytes SectionsOf(DType dtype) {
  switch (dtype) {
    case DType::kQ8_0:
      return {0, 32, 8 * kUnit, 0};
    case DType::kQ4_K:
      return {64, 32, 4 * kUnit, 0};
    case DType::kQ5_K:
      return {64, 32, 4 * kUnit, kUnit};
    case DType::kQ6_K:
      return {32, 32, 4 * kUnit, 2 * kUnit};
    default:  // q4_0, q4
      return {0, 32, 4 * kUnit, 0};
  }
}

constexpr size_t RoundUp(size_t bytes) { return (bytes + kUnit - 1) / kUnit * kUnit; }

// Where a row's blocks of 32 are found in a panel: copies one block in either direction.
struct Lane {
  const PanelLayout& layout;
  const SectionBytes sections = SectionsOf(layout.dtype);
  std::byte* panel;
  int lane;

  uint8_t* Super(int64_t block) const { return At(layout.super, sections.super, block / 8); }
  uint8_t* Scales(int64_t block) const { return At(layout.scales, sections.scales, block); }
  uint8_t* Quants(int64_t block) const { return At(layout.quants, sections.quants, block); }
  uint8_t* High(int64_t block) const { return At(layout.high, sections.high, block); }

 private:
  uint8_t* At(size_t offset, size_t each, int64_t index) const {
    return reinterpret_cast<uint8_t*>(panel) + offset + each * static_cast<size_t>(index);
  }
};

// Bytes 4j..4j+3 of an output's 16 or 32 lie in unit j, at its lane.
void PutUnits(const uint8_t* bytes, int units, int lane, uint8_t* to) {
  for (int j = 0; j < units; ++j) std::memcpy(to + j * kUnit + lane * 4, bytes + 4 * j, 4);
}
void GetUnits(const uint8_t* from, int units, int lane, uint8_t* bytes) {
  for (int j = 0; j < units; ++j) std::memcpy(bytes + 4 * j, from + j * kUnit + lane * 4, 4);
}

void PackKBlock(const Lane& to, const uint8_t* block, int64_t super_index) {
  const DType dtype = to.layout.dtype;
  const bool six = dtype == DType::kQ6_K;
  std::memcpy(to.Super(super_index * 8) + to.lane * 2, block + (six ? 208 : 0), 2);
  if (!six) std::memcpy(to.Super(super_index * 8) + 32 + to.lane * 2, block + 2, 2);
  for (int s = 0; s < 8; ++s) {
    const int64_t index = super_index * 8 + s;
    const ScaleAndMin packed =
        six ? ScaleAndMin{block[192 + 2 * s], block[193 + 2 * s]} : KScaleAndMin(block + 4, s);
    to.Scales(index)[to.lane] = packed.scale;
    to.Scales(index)[16 + to.lane] = packed.min;
    uint8_t q[32], low[16];
    KElements(dtype, block, s, q);
    for (int i = 0; i < 16; ++i) low[i] = static_cast<uint8_t>((q[i] & 15) | (q[i + 16] & 15) << 4);
    PutUnits(low, 4, to.lane, to.Quants(index));
    for (int i = 0; i < 32 && dtype == DType::kQ5_K; ++i) {
      to.High(index)[to.lane * 4 + i % 4] |= static_cast<uint8_t>((q[i] >> 4) << (i / 4));
    }
    for (int i = 0; i < 32 && six; ++i) {
      to.High(index)[static_cast<size_t>(i / 16) * kUnit + to.lane * 4 + i % 4] |=
          static_cast<uint8_t>((q[i] >> 4) << (i % 16 / 4 * 2));
    }
  }
}

// b: index of a block of 32 columns, or of 256 in a K-quant.
void PackBlock(const Lane& to, const uint8_t* block, int64_t b) {
  if (IsKQuant(to.layout.dtype)) return PackKBlock(to, block, b);
  std::memcpy(to.Scales(b) + to.lane * 2, block, 2);
  if (to.layout.dtype == DType::kQ8_0) {
    uint8_t shifted[32];
    for (int i = 0; i < 32; ++i) shifted[i] = static_cast<uint8_t>(block[2 + i] ^ 0x80u);
    PutUnits(shifted, 8, to.lane, to.Quants(b));
  } else {
    PutUnits(block + 2, 4, to.lane, to.Quants(b));
  }
}

// Element k of a panel of plain numbers lies `index` elements in.
size_t PlainIndex(DType dtype, int64_t k, int lane) {
  if (dtype == DType::kBF16) return static_cast<size_t>(k / 2 * 32 + lane * 2 + k % 2);
  return static_cast<size_t>(k * kPanelOuts + lane);
}

// Rows of `words` Words each, as columns.
template <typename Word>
void PackWords(int64_t words, const std::byte* from, size_t row_bytes, int count, std::byte* panel) {
  for (int64_t w = 0; w < words; ++w, from += sizeof(Word), panel += kPanelOuts * sizeof(Word)) {
    for (int lane = 0; lane < count; ++lane) {
      std::memcpy(panel + lane * sizeof(Word), from + lane * row_bytes, sizeof(Word));
    }
  }
}

void UnpackK(const Lane& from, int64_t block, float* out) {
  const DType dtype = from.layout.dtype;
  const uint8_t* super = from.Super(block);
  const uint8_t* scales = from.Scales(block);
  uint16_t d_bits, dmin_bits = 0;
  std::memcpy(&d_bits, super + from.lane * 2, 2);
  if (dtype != DType::kQ6_K) std::memcpy(&dmin_bits, super + 32 + from.lane * 2, 2);
  const float d = F16ToFloat(d_bits);
  uint8_t low[16];
  GetUnits(from.Quants(block), 4, from.lane, low);
  for (int i = 0; i < 32; ++i) {
    const int q = (low[i % 16] >> (i / 16 * 4)) & 15;
    const uint8_t first = scales[from.lane], second = scales[16 + from.lane];
    if (dtype == DType::kQ6_K) {
      const uint8_t high = from.High(block)[static_cast<size_t>(i / 16) * kUnit + from.lane * 4 + i % 4];
      const float scale = d * static_cast<float>(static_cast<int8_t>(i < 16 ? first : second));
      out[i] = scale * static_cast<float>((q | ((high >> (i % 16 / 4 * 2)) & 3) << 4) - 32);
    } else {
      const int high = dtype == DType::kQ5_K ? (from.High(block)[from.lane * 4 + i % 4] >> (i / 4)) & 1 : 0;
      const float scale = d * static_cast<float>(first);
      out[i] = scale * static_cast<float>(q | high << 4) - F16ToFloat(dmin_bits) * static_cast<float>(second);
    }
  }
}

}  // namespace

PanelLayout::PanelLayout(DType type, int64_t columns) : dtype(type), cols(columns) {
  const auto count = static_cast<size_t>(columns);
  if (!IsQuantized(type)) {
    bytes = type == DType::kBF16 ? (count + 1) / 2 * kUnit
                                 : RoundUp(count * kPanelOuts * static_cast<size_t>(BlockOf(type).bytes));
    return;
  }
  const SectionBytes sections = SectionsOf(type);
  const size_t blocks = count / kQuantBlock;
  scales = RoundUp(blocks / 8 * sections.super);
  quants = scales + RoundUp(blocks * sections.scales);
  high = quants + blocks * sections.quants;
  bytes = high + blocks * sections.high;
}

void PackPanel(const PanelLayout& layout, const std::byte* from, size_t row_bytes, int count,
               std::byte* panel) {
  // All rows of a place before the next place: the panel is written from its first line to its last.
  const int64_t cols = layout.cols;
  if (layout.dtype == DType::kF32) return PackWords<uint32_t>(cols, from, row_bytes, count, panel);
  if (layout.dtype == DType::kF16) return PackWords<uint16_t>(cols, from, row_bytes, count, panel);
  if (layout.dtype == DType::kBF16) {  // pairs
    PackWords<uint32_t>(cols / 2, from, row_bytes, count, panel);
    for (int lane = 0; lane < count && cols % 2 != 0; ++lane) {
      std::memcpy(panel + PlainIndex(DType::kBF16, cols - 1, lane) * 2,
                  from + static_cast<size_t>(lane) * row_bytes + (cols - 1) * 2, 2);
    }
    return;
  }
  const DTypeBlock size = BlockOf(layout.dtype);
  for (int64_t b = 0; b < cols / size.elements; ++b, from += size.bytes) {
    for (int lane = 0; lane < count; ++lane) {
      PackBlock({.layout = layout, .panel = panel, .lane = lane},
                reinterpret_cast<const uint8_t*>(from) + static_cast<size_t>(lane) * row_bytes, b);
    }
  }
}

absl::StatusOr<Weight> LoadPanels(const TensorView& host, DType dtype, ThreadPool& pool) {
  if (absl::Status possible = CheckConversion(host, dtype); !possible.ok()) return possible;
  const PanelLayout layout(dtype, host.cols);
  const int64_t panels = PanelCount(host.rows);
  absl::StatusOr<Buffer> memory =
      AllocateHostMemory(static_cast<size_t>(panels) * layout.bytes, /*full=*/true);
  if (!memory.ok()) return memory.status();
  pool.ParallelFor((host.rows + kPanelOuts - 1) / kPanelOuts, [&](int64_t panel, int) {
    const size_t host_row = RowBytes(host.dtype, host.cols), row = RowBytes(dtype, host.cols);
    const std::byte* from = static_cast<const std::byte*>(host.data) + panel * kPanelOuts * host_row;
    const int count = static_cast<int>(std::min<int64_t>(kPanelOuts, host.rows - panel * kPanelOuts));
    std::vector<std::byte> converted;
    if (host.dtype != dtype) {
      std::vector<float> values(static_cast<size_t>(host.cols));
      converted.resize(row * kPanelOuts);
      for (int i = 0; i < count; ++i) {
        DequantizeRow(host.dtype, from + i * host_row, host.cols, values.data());
        QuantizeRow(dtype, values.data(), host.cols, converted.data() + i * row);
      }
      from = converted.data();
    }
    PackPanel(layout, from, row, count, memory->data() + static_cast<size_t>(panel) * layout.bytes);
  });
  Weight weight;
  weight.view = {memory->data(), dtype, host.rows, host.cols, /*packed=*/true};
  weight.memory = *std::move(memory);
  return weight;
}

void UnpackRow(const TensorView& packed, int64_t row, float* out) {
  const PanelLayout layout(packed.dtype, packed.cols);
  // Only read from.
  std::byte* panel = const_cast<std::byte*>(static_cast<const std::byte*>(packed.data)) +
                     static_cast<size_t>(row / kPanelOuts) * layout.bytes;
  const Lane from{.layout = layout, .panel = panel, .lane = static_cast<int>(row % kPanelOuts)};
  const size_t size = static_cast<size_t>(BlockOf(packed.dtype).bytes);
  if (!IsQuantized(packed.dtype)) {
    for (int64_t k = 0; k < packed.cols; ++k) {
      DequantizeRow(packed.dtype, panel + PlainIndex(packed.dtype, k, from.lane) * size, 1, out + k);
    }
    return;
  }
  for (int64_t b = 0; b < packed.cols / kQuantBlock; ++b, out += kQuantBlock) {
    if (IsKQuant(packed.dtype)) {
      UnpackK(from, b, out);
      continue;
    }
    uint8_t block[34];
    std::memcpy(block, from.Scales(b) + from.lane * 2, 2);
    const int units = packed.dtype == DType::kQ8_0 ? 8 : 4;
    GetUnits(from.Quants(b), units, from.lane, block + 2);
    for (int i = 0; i < 32 && units == 8; ++i) block[2 + i] ^= 0x80u;
    DequantizeRow(packed.dtype, block, kQuantBlock, out);
  }
}

}  // namespace atp::cpu
