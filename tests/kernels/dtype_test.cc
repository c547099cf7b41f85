#include "kernels/dtype.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "gtest/gtest.h"

namespace atp {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(DType, SizesAndNames) {
  EXPECT_EQ(RowBytes(DType::kF32, 1), 4u);
  EXPECT_EQ(RowBytes(DType::kBF16, 1), 2u);
  EXPECT_EQ(RowBytes(DType::kF16, 1), 2u);
  EXPECT_EQ(Name(DType::kBF16), "bf16");
}

TEST(DType, EveryBf16RoundTrips) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = BF16ToFloat(static_cast<uint16_t>(bits));
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(BF16ToFloat(FloatToBF16(value)))) << bits;
    } else {
      ASSERT_EQ(FloatToBF16(value), bits);
    }
  }
}

TEST(DType, Bf16RoundsToNearestEven) {
  EXPECT_EQ(FloatToBF16(std::bit_cast<float>(0x3f808000u)), 0x3f80);  // half way: even below
  EXPECT_EQ(FloatToBF16(std::bit_cast<float>(0x3f818000u)), 0x3f82);  // half way: even above
  EXPECT_EQ(FloatToBF16(std::bit_cast<float>(0x3f808001u)), 0x3f81);
  EXPECT_EQ(FloatToBF16(std::bit_cast<float>(0x3f807fffu)), 0x3f80);
  EXPECT_EQ(BF16ToFloat(FloatToBF16(std::numeric_limits<float>::max())), kInfinity);
  // A NaN whose payload is in the low bits only must not become infinity.
  EXPECT_TRUE(std::isnan(BF16ToFloat(FloatToBF16(std::bit_cast<float>(0x7f800001u)))));
}

TEST(DType, EveryF16HasItsValueByDefinition) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = F16ToFloat(static_cast<uint16_t>(bits));
    const int exponent = static_cast<int>((bits >> 10) & 31);
    const int mantissa = static_cast<int>(bits & 1023);
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    if (exponent == 31 && mantissa != 0) {
      EXPECT_TRUE(std::isnan(value)) << bits;
    } else if (exponent == 31) {
      EXPECT_EQ(value, sign * kInfinity) << bits;
    } else {
      const double expected =
          exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
      ASSERT_EQ(value, sign * expected) << bits;
      ASSERT_EQ(std::signbit(value), (bits & 0x8000) != 0) << bits;
    }
  }
}

TEST(DType, EveryE4M3HasItsValueByDefinitionAndRoundTrips) {
  for (uint32_t bits = 0; bits < 256; ++bits) {
    const float value = E4M3ToFloat(static_cast<uint8_t>(bits));
    const int exponent = static_cast<int>(bits >> 3 & 15), mantissa = static_cast<int>(bits & 7);
    EXPECT_EQ(FloatToE4M3(value), bits);
    if ((bits & 127) == 127) {
      EXPECT_TRUE(std::isnan(value)) << bits;
      continue;
    }
    const double sign = bits & 0x80 ? -1.0 : 1.0;
    EXPECT_EQ(value,
              sign * (exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10)));
    EXPECT_EQ(std::signbit(value), (bits & 0x80) != 0) << bits;
  }
}

// Between neighbours the nearer one, of two as near the even one; beyond the largest the largest.
TEST(DType, E4M3RoundsToNearestEven) {
  for (uint8_t bits = 0; bits < 0x7e; ++bits) {
    const auto next = static_cast<uint8_t>(bits + 1);
    const float middle = (E4M3ToFloat(bits) + E4M3ToFloat(next)) / 2;
    EXPECT_EQ(FloatToE4M3(middle), bits % 2 == 0 ? bits : next);
    EXPECT_EQ(FloatToE4M3(std::nextafter(middle, 0.0f)), bits);
    EXPECT_EQ(FloatToE4M3(-std::nextafter(middle, 1e9f)), next | 0x80);
  }
  EXPECT_EQ(FloatToE4M3(449), 0x7e);
  EXPECT_EQ(FloatToE4M3(-kInfinity), 0xfe);
  EXPECT_EQ(FloatToE4M3(std::nanf("")) & 0x7f, 0x7f);
}

}  // namespace
}  // namespace atp
