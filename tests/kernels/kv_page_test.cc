#include "kernels/kv_page.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/dtype.h"
#include "kernels/walsh_hadamard.h"

namespace atp {
namespace {

using ::testing::Optional;

TEST(KvPage, EightKilobytesAtHeadDim128Bf16) {
  const KvPage page(KvFormat::kBF16, 16, 128, false);
  EXPECT_EQ(page.bytes(), 8192u);
  EXPECT_EQ(page.value_offset(), 4096u);
}

TEST(KvPage, RegionsDoNotOverlapAndBytesAreAligned) {
  for (const KvFormat format : {KvFormat::kF32, KvFormat::kBF16}) {
    for (const int entries : {16, 32, 64}) {
      for (const int head_dim : {2, 6, 8, 40, 64, 128}) {
        const size_t matrix = static_cast<size_t>(entries) * head_dim * (format == KvFormat::kF32 ? 4 : 2);
        const KvPage page(format, entries, head_dim, true);
        EXPECT_EQ(page.key_offset(), 0u);
        EXPECT_GE(page.value_offset(), matrix);
        EXPECT_GE(page.log_mass_offset(), page.value_offset() + matrix);
        EXPECT_EQ(page.log_mass_offset() % alignof(float), 0u);
        EXPECT_GE(page.bytes(), page.log_mass_offset() + entries * sizeof(float));
        EXPECT_EQ(page.bytes() % 64, 0u);
        EXPECT_LE(KvPage(format, entries, head_dim, false).bytes(), page.bytes());
      }
    }
  }
}

TEST(KvPage, RoundTripOfEveryEntry) {
  const unsigned seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  for (const KvFormat format : {KvFormat::kF32, KvFormat::kBF16}) {
    for (const bool with_log_mass : {false, true}) {
      const int head_dim = 10;
      const KvPage page(format, 32, head_dim, with_log_mass);
      // One byte more than the page must stay untouched.
      std::vector<std::byte> block(page.bytes() + 1, std::byte{0x5a});
      std::vector<float> keys(32 * head_dim), values(32 * head_dim), masses(32);
      for (float& x : keys) x = normal(rng);
      for (float& x : values) x = normal(rng);
      for (float& x : masses) x = normal(rng);
      masses[7] = -std::numeric_limits<float>::infinity();
      for (int e = 0; e < 32; ++e) {
        page.Store(block.data(), e, &keys[e * head_dim], &values[e * head_dim], masses[e]);
      }
      EXPECT_EQ(block.back(), std::byte{0x5a});
      for (int e = 0; e < 32; ++e) {
        std::vector<float> key(head_dim), value(head_dim);
        float mass = -1;
        page.Load(block.data(), e, key.data(), value.data(), &mass);
        EXPECT_EQ(mass, with_log_mass ? masses[e] : 0.0f);
        for (int i = 0; i < head_dim; ++i) {
          const float k = keys[e * head_dim + i];
          const float v = values[e * head_dim + i];
          EXPECT_EQ(key[i], format == KvFormat::kF32 ? k : BF16ToFloat(FloatToBF16(k)));
          EXPECT_EQ(value[i], format == KvFormat::kF32 ? v : BF16ToFloat(FloatToBF16(v)));
        }
      }
    }
  }
}

TEST(KvPage, LayoutIsTheDocumentedOne) {
  const KvPage page(KvFormat::kF32, 16, 4, true);
  std::vector<float> block(page.bytes() / sizeof(float), -1.0f);
  const float key[4] = {1, 2, 3, 4};
  const float value[4] = {5, 6, 7, 8};
  page.Store(reinterpret_cast<std::byte*>(block.data()), 3, key, value, 9.0f);
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(block[i * 16 + 3], key[i]);
    EXPECT_EQ(block[page.value_offset() / 4 + 3 * 4 + i], value[i]);
  }
  EXPECT_EQ(block[page.log_mass_offset() / 4 + 3], 9.0f);
}

TEST(KvFormat, NamesRoundTrip) {
  for (const KvFormat format : kKvFormats) {
    EXPECT_THAT(KvFormatFromName(Name(format)), Optional(format));
  }
  EXPECT_EQ(KvFormatFromName("fp16"), std::nullopt);
}

// Half a step of the entry's own scale, which bf16 makes at most 2⁻⁷ larger than it need be. A step of fp8 is
// an eighth of the element's power of two, and of 2^-6 below that.
double HalfAStep(KvFormat format, float x, float largest) {
  const double scale = static_cast<double>(largest) / TopOf(format) * (1 + 0x1p-7);
  if (format != KvFormat::kFp8) return scale / 2;
  return std::max(std::abs(static_cast<double>(x)), scale * 0x1p-6) / 16;
}

TEST(KvPage, FewBitsAreWithinHalfAStep) {
  for (const KvFormat format : {KvFormat::kFp8, KvFormat::kInt8, KvFormat::kInt4}) {
    for (const int head_dim : {2, 8, 34, 128}) {
      const KvPage page(format, 32, head_dim, true);
      std::vector<std::byte> block(page.bytes(), std::byte{0xff});
      std::mt19937 rng(static_cast<uint32_t>(head_dim));
      std::normal_distribution<float> normal;
      std::vector<std::vector<float>> keys, values;
      for (int e = 0; e < 32; ++e) {
        for (auto* all : {&keys, &values}) {
          std::vector<float>& x = all->emplace_back(head_dim);
          for (float& f : x) f = normal(rng) * std::exp(normal(rng));
        }
      }
      for (int e = 31; e >= 0; --e)
        page.Store(block.data(), e, keys[e].data(), values[e].data(), static_cast<float>(e));
      for (int e = 0; e < 32; ++e) {
        std::vector<float> key(head_dim, NAN), value(head_dim, NAN);
        float log_mass = NAN;
        page.Load(block.data(), e, key.data(), value.data(), &log_mass);
        EXPECT_EQ(log_mass, static_cast<float>(e));
        if (RotatesKeys(format)) {
          WalshHadamard(key.data(), head_dim);
          WalshHadamard(keys[e].data(), head_dim);
        }
        for (const auto& [got, wanted] : {std::pair(&key, &keys[e]), std::pair(&value, &values[e])}) {
          float largest = 0;
          for (const float f : *wanted) largest = std::max(largest, std::abs(f));
          for (int i = 0; i < head_dim; ++i) {
            EXPECT_LE(std::abs((*got)[i] - (*wanted)[i]), HalfAStep(format, (*wanted)[i], largest) + 1e-6)
                << Name(format) << " entry " << e << " dimension " << i;
          }
        }
      }
    }
  }
}

TEST(WalshHadamard, IsItsOwnInverseAndKeepsProducts) {
  std::mt19937 rng(5);
  std::normal_distribution<float> normal;
  for (const int d : {1, 2, 8, 20, 34, 48, 64, 128}) {
    std::vector<float> x(d), y(d);
    for (float& f : x) f = normal(rng);
    for (float& f : y) f = normal(rng);
    std::vector<float> a = x, b = y;
    WalshHadamard(a.data(), d);
    WalshHadamard(b.data(), d);
    EXPECT_NEAR(std::inner_product(a.begin(), a.end(), b.begin(), 0.0),
                std::inner_product(x.begin(), x.end(), y.begin(), 0.0), 1e-4);
    if (d % 4 == 0) {
      EXPECT_NE(a, x);
    }
    WalshHadamard(a.data(), d);
    for (int i = 0; i < d; ++i) EXPECT_NEAR(a[i], x[i], 1e-5) << d;
  }
}

// An element of 100 makes steps of 14 at 4 bits: the other elements, of about 1, would all be 0.
TEST(KvPage, OneLargeElementOfAKeyDoesNotCoarsenTheOthers) {
  std::mt19937 rng(6);
  std::normal_distribution<float> normal;
  const int head_dim = 64;
  std::vector<float> key(head_dim), value(head_dim);
  for (float& f : key) f = normal(rng);
  key[37] = 100;
  for (const auto& [format, error] : {std::pair(KvFormat::kInt8, 0.05), std::pair(KvFormat::kInt4, 0.75)}) {
    const KvPage page(format, 16, head_dim, false);
    std::vector<std::byte> block(page.bytes());
    page.Store(block.data(), 3, key.data(), value.data());
    std::vector<float> got(head_dim);
    float log_mass;
    page.Load(block.data(), 3, got.data(), value.data(), &log_mass);
    double sum = 0;
    for (int i = 0; i < head_dim; ++i) sum += std::pow(got[i] - key[i], 2);
    EXPECT_LT(std::sqrt(sum / head_dim), error) << Name(format);
  }
}

TEST(KvPage, FewBitsTakeAHalfAndAQuarterAndTheirScales) {
  const size_t scales = 16 * 2 * sizeof(uint16_t), log_mass = 16 * sizeof(float);
  EXPECT_EQ(KvPage(KvFormat::kFp8, 16, 128, true).bytes(), 2 * 16 * 128 + scales + log_mass);
  EXPECT_EQ(KvPage(KvFormat::kInt8, 16, 128, true).bytes(), 2 * 16 * 128 + scales + log_mass);
  EXPECT_EQ(KvPage(KvFormat::kInt4, 16, 128, true).bytes(), 16 * 128 + scales + log_mass);
}

TEST(KvPage, NothingIsStoredAsNothing) {
  for (const KvFormat format : {KvFormat::kFp8, KvFormat::kInt8, KvFormat::kInt4}) {
    const KvPage page(format, 16, 8, true);
    std::vector<std::byte> block(page.bytes(), std::byte{0xff});
    const std::vector<float> zero(8, 0.0f);
    page.Store(block.data(), 3, zero.data(), zero.data(), 0.0f);
    std::vector<float> key(8, NAN), value(8, NAN);
    float log_mass;
    page.Load(block.data(), 3, key.data(), value.data(), &log_mass);
    EXPECT_EQ(key, zero);
    EXPECT_EQ(value, zero);
  }
}

}  // namespace
}  // namespace atp
