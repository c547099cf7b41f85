#include "cli/load_progress.h"

#include <unistd.h>

#include <cstdio>
#include <utility>

#include "absl/time/clock.h"
#include "spdlog/spdlog.h"

namespace atp {
namespace {

constexpr int kBarColumns = 30;
constexpr absl::Duration kRedraw = absl::Milliseconds(50);
constexpr absl::Duration kLogLine = absl::Seconds(2);

double Mebibytes(size_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

}  // namespace

LoadProgressBar::LoadProgressBar(std::string what)
    : what_(std::move(what)),
      terminal_(isatty(STDERR_FILENO) == 1),
      started_(absl::Now()),
      shown_(terminal_ ? absl::InfinitePast() : started_) {}

LoadProgressBar::~LoadProgressBar() {
  if (drawn_) std::fputs("\r\x1b[K", stderr);  // the start line says what was loaded
}

void LoadProgressBar::Update(size_t done_bytes, size_t total_bytes) {
  const absl::Time now = absl::Now();
  if (now - shown_ < (terminal_ ? kRedraw : kLogLine)) return;
  shown_ = now;
  if (terminal_) {
    Draw(done_bytes, total_bytes);
    return;
  }
  spdlog::info("loading model={} done_bytes={} total_bytes={} seconds={:.1f}", what_, done_bytes, total_bytes,
               absl::ToDoubleSeconds(now - started_));
}

void LoadProgressBar::Draw(size_t done_bytes, size_t total_bytes) {
  const double share =
      total_bytes == 0 ? 1.0 : static_cast<double>(done_bytes) / static_cast<double>(total_bytes);
  const int filled = static_cast<int>(share * kBarColumns);
  char bar[kBarColumns + 1];
  for (int i = 0; i < kBarColumns; ++i) bar[i] = i < filled ? '#' : '.';
  bar[kBarColumns] = '\0';
  std::fprintf(stderr, "\rloading %s [%s] %3d %%  %.0f of %.0f MiB\x1b[K", what_.c_str(), bar,
               static_cast<int>(share * 100), Mebibytes(done_bytes), Mebibytes(total_bytes));
  std::fflush(stderr);
  drawn_ = true;
}

}  // namespace atp
