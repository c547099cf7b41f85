#include "kernels/quantized.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/host_memory.h"
#include "tests/kernels/op_problems.h"

namespace atp {
namespace {

std::vector<float> RoundTrip(DType dtype, const std::vector<float>& values) {
  std::vector<std::byte> bytes(RowBytes(dtype, static_cast<int64_t>(values.size())));
  QuantizeRow(dtype, values.data(), static_cast<int64_t>(values.size()), bytes.data());
  std::vector<float> back(values.size());
  DequantizeRow(dtype, bytes.data(), static_cast<int64_t>(values.size()), back.data());
  return back;
}

double RelativeRms(const std::vector<float>& expected, const std::vector<float>& actual) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += std::pow(expected[i] - actual[i], 2);
    norm += std::pow(expected[i], 2);
  }
  return std::sqrt(error / norm);
}

TEST(Quantized, Q8IsWithinHalfAStepOfEveryElement) {
  Random random(TestSeed());
  const std::vector<float> values = Normals(random, 4096);
  const std::vector<float> back = RoundTrip(DType::kQ8_0, values);
  for (size_t block = 0; block < values.size(); block += 32) {
    float largest = 0;
    for (size_t i = block; i < block + 32; ++i) largest = std::max(largest, std::abs(values[i]));
    // Half a step, plus the scale's own rounding to fp16 (2^-11 of up to 127 steps).
    const float bound = largest / 127 * (0.5f + 127 * 0x1p-11f);
    for (size_t i = block; i < block + 32; ++i) ASSERT_LE(std::abs(values[i] - back[i]), bound) << i;
  }
}

// 0.0732 is what Lloyd's iteration reached for such blocks; uniform levels cannot get below 0.08.
TEST(Quantized, Q4IsCloserToNormalWeightsThanUniformLevels) {
  Random random(TestSeed());
  const std::vector<float> values = Normals(random, 1 << 17);
  const double fitted = RelativeRms(values, RoundTrip(DType::kQ4, values));
  const double linear = RelativeRms(values, RoundTrip(DType::kQ4_0, values));
  RecordProperty("q4", std::to_string(fitted));
  RecordProperty("q4_0", std::to_string(linear));
  EXPECT_LT(fitted, 0.0745);
  EXPECT_LT(fitted, linear * 0.95);
  EXPECT_LT(linear, 0.1);
}

TEST(Quantized, QuantizingWhatIsQuantizedChangesNothing) {
  Random random(TestSeed());
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kQ8_0}) {
    const std::vector<float> once = RoundTrip(dtype, Normals(random, 256));
    EXPECT_EQ(RoundTrip(dtype, once), once) << Name(dtype);
  }
  for (const DType dtype : {DType::kQ4_0, DType::kQ4}) {
    const std::vector<float> once = RoundTrip(dtype, Normals(random, 256));
    EXPECT_LT(RelativeRms(once, RoundTrip(dtype, once)), 0.02) << Name(dtype);
  }
}

TEST(Quantized, OddBlocks) {
  const float kInf = std::numeric_limits<float>::infinity();
  for (const DType dtype : {DType::kQ8_0, DType::kQ4_0, DType::kQ4}) {
    const std::vector<float> zeros(32, 0.0f);
    EXPECT_EQ(RoundTrip(dtype, zeros), zeros) << Name(dtype);
    for (const float odd : {kInf, -kInf, std::nanf("")}) {
      std::vector<float> poisoned(64, 1.0f);
      poisoned[7] = odd;
      const std::vector<float> back = RoundTrip(dtype, poisoned);
      for (int i = 0; i < 32; ++i) EXPECT_EQ(back[i], 0.0f);
      for (int i = 32; i < 64; ++i) EXPECT_NEAR(back[i], 1.0f, 0.01f);
    }
    for (const float size : {1e-30f, 1e-7f, 1e30f, 3e38f}) {  // beyond what an fp16 scale can hold
      for (const float value : RoundTrip(dtype, std::vector<float>(32, size)))
        EXPECT_TRUE(std::isfinite(value));
    }
  }
}

// Blocks written out by hand from the formats' description.
TEST(Quantized, Q6KByHand) {
  std::vector<uint8_t> block(210, 0);
  const uint16_t two = FloatToF16(2.0f);
  std::memcpy(&block[208], &two, sizeof(two));
  for (int i = 0; i < 16; ++i) block[192 + i] = static_cast<uint8_t>(static_cast<int8_t>(i - 8));
  // Element 128 + 37: second half, quarter 1, i = 5. Six bits: 0b101101 = 45.
  block[64 + 32 + 5] = 0x0d;
  block[128 + 32 + 5] = 0x02 << 2;
  std::vector<float> out(256);
  DequantizeRow(DType::kQ6_K, block.data(), 256, out.data());
  EXPECT_EQ(out[165], 2.0f * (165 / 16 - 8) * (45 - 32));
  EXPECT_EQ(out[0], 2.0f * -8 * -32);
  // Element 70: first half, quarter 2 (high nibble of byte i = 6), upper bits at 4.
  block[6] = 0xf0;
  block[128 + 6] = 0x01 << 4;
  DequantizeRow(DType::kQ6_K, block.data(), 256, out.data());
  EXPECT_EQ(out[70], 2.0f * (70 / 16 - 8) * (31 - 32));
}

TEST(Quantized, Q4KAndQ5KByHand) {
  for (const bool five_bits : {false, true}) {
    std::vector<uint8_t> block(five_bits ? 176 : 144, 0);
    const uint16_t d = FloatToF16(0.5f), dmin = FloatToF16(0.25f);
    std::memcpy(&block[0], &d, sizeof(d));
    std::memcpy(&block[2], &dmin, sizeof(dmin));
    block[4 + 1] = 33;           // scale of sub-block 1: 33
    block[4 + 5] = 21 | 2 << 6;  // minimum of sub-block 1: 21; upper bits of sub-block 5's
    block[4 + 1] = static_cast<uint8_t>(33 | 3 << 6);
    block[4 + 9] = 0x0a | 0x05 << 4;  // sub-block 5: scale 3·16 + 10, minimum 2·16 + 5
    uint8_t* low = block.data() + (five_bits ? 48 : 16);
    low[3] = 0x90;            // sub-block 1, element 3: 9
    low[2 * 32 + 31] = 0xc0;  // sub-block 5, element 31: 12
    if (five_bits) block[16 + 31] = 1 << 5;
    const int high = five_bits ? 16 : 0;
    std::vector<float> out(256);
    DequantizeRow(five_bits ? DType::kQ5_K : DType::kQ4_K, block.data(), 256, out.data());
    EXPECT_EQ(out[32 + 3], 0.5f * 33 * 9 - 0.25f * 21);
    EXPECT_EQ(out[32 + 4], -0.25f * 21);
    EXPECT_EQ(out[5 * 32 + 31], 0.5f * 58 * (12 + high) - 0.25f * 37);
    EXPECT_EQ(out[0], 0.0f);
  }
}

TEST(Quantized, HalfRoundsToNearestEvenAndBack) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = F16ToFloat(static_cast<uint16_t>(bits));
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(F16ToFloat(FloatToF16(value)))) << bits;
      continue;
    }
    ASSERT_EQ(FloatToF16(value), bits);
    if (std::isinf(value) || (bits & 0x7fffu) >= 0x7bffu) continue;
    const float next = F16ToFloat(static_cast<uint16_t>(bits + 1));
    const float middle = (value + next) / 2;  // exact in fp32
    ASSERT_EQ(FloatToF16(middle), bits + (bits & 1u)) << bits;
    ASSERT_EQ(FloatToF16(std::nextafter(middle, value)), bits);
    ASSERT_EQ(FloatToF16(std::nextafter(middle, next)), bits + 1);
  }
  EXPECT_EQ(FloatToF16(65519.0f), 0x7bff);
  EXPECT_EQ(FloatToF16(65520.0f), 0x7c00);
  EXPECT_EQ(FloatToF16(-1e30f), 0xfc00);
}

TEST(LoadHostWeight, ConvertsRowByRow) {
  Random random(TestSeed());
  const Matrix weight = RandomMatrix(random, DType::kF32, 5, 64);
  const auto loaded = LoadHostWeight(weight.view, DType::kQ8_0);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->memory.bytes(), 5 * RowBytes(DType::kQ8_0, 64));
  std::vector<float> values(5 * 64), back(values.size());
  DequantizeRow(DType::kF32, weight.view.data, 5 * 64, values.data());
  DequantizeRow(DType::kQ8_0, loaded->view.data, 5 * 64, back.data());
  EXPECT_LT(RelativeRms(values, back), 0.01);
}

TEST(LoadHostWeight, RefusesWhatCannotBe) {
  const std::vector<float> values(80);
  const TensorView ragged{values.data(), DType::kF32, 2, 40};
  EXPECT_EQ(LoadHostWeight(ragged, DType::kQ4).status().code(), absl::StatusCode::kInvalidArgument);
  const std::vector<float> wide(256);
  const TensorView row{wide.data(), DType::kF32, 1, 256};
  const absl::Status status = LoadHostWeight(row, DType::kQ4_K).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(std::string(status.message()).find("q4_k"), std::string::npos);
}

}  // namespace
}  // namespace atp
