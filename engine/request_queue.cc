#include "engine/request_queue.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <utility>

#include "absl/base/macros.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace atp {
namespace {

RequestId NextRequestId() {
  static std::atomic<RequestId> next{1};
  return next.fetch_add(1, std::memory_order_relaxed);
}

// A wait longer than this is as good as forever, and stays inside the range of chrono's clocks.
constexpr absl::Duration kLongest = absl::Hours(24 * 365);

}  // namespace

absl::StatusOr<RequestId> RequestQueue::Push(Request request, std::shared_ptr<OutputSink> sink,
                                             std::shared_ptr<const CompressionPlan> plan) {
  Submission submission;
  submission.request = std::make_shared<const Request>(std::move(request));
  submission.sink = std::move(sink);
  submission.plan = std::move(plan);
  submission.submitted = absl::Now();
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return absl::UnavailableError(why_closed_);
  if (waiting_ >= max_waiting_) {
    return absl::ResourceExhaustedError(
        absl::StrCat(waiting_, " requests are waiting, as many as scheduler.max_waiting_requests (",
                     max_waiting_, ") allows; try again later"));
  }
  if (active_ >= max_active_) {
    return absl::ResourceExhaustedError(
        absl::StrCat(active_,
                     " requests wait or have begun, preempted ones included, as many as "
                     "scheduler.max_waiting_requests and scheduler.max_running_requests (",
                     max_active_, " together) allow; try again later"));
  }
  const RequestId id = NextRequestId();
  submission.id = id;
  if (active_ == 0) last_end_ = submission.submitted;
  ++waiting_;
  ++active_;
  submissions_.push_back(std::move(submission));
  arrived_.notify_one();
  return id;
}

void RequestQueue::Cancel(RequestId id) {
  std::lock_guard<std::mutex> lock(mutex_);
  cancels_.push_back(id);
  arrived_.notify_one();
}

absl::Status RequestQueue::Drain(absl::Duration timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  closed_ = true;
  const auto idle = [this] { return active_ == 0; };
  const auto limit = absl::ToChronoNanoseconds(std::clamp(timeout, absl::ZeroDuration(), kLongest));
  if (idle_.wait_for(lock, limit, idle)) return absl::OkStatus();
  const int rest = active_;
  end_all_ = true;
  arrived_.notify_one();
  idle_.wait(lock, idle);
  return absl::DeadlineExceededError(absl::StrCat(rest, " requests were still running after ",
                                                  absl::FormatDuration(timeout), " and had to be ended"));
}

void RequestQueue::Close(std::string why) {
  std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  why_closed_ = std::move(why);
}

void RequestQueue::Stop() {
  std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  stop_ = true;
  arrived_.notify_one();
}

int RequestQueue::waiting() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return waiting_;
}

int RequestQueue::active() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return active_;
}

absl::Duration RequestQueue::RetryAfter() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::clamp(pace_ * std::max(waiting_, 1), absl::Seconds(1), absl::Minutes(1));
}

void RequestQueue::Take(bool wait, absl::Time until, Intake* intake) {
  intake->submissions.clear();
  intake->cancels.clear();
  std::unique_lock<std::mutex> lock(mutex_);
  if (wait && until == absl::InfiniteFuture()) {
    arrived_.wait(lock, [this] { return SomethingArrived(); });
  } else if (wait) {
    const auto limit =
        absl::ToChronoNanoseconds(std::clamp(until - absl::Now(), absl::ZeroDuration(), kLongest));
    arrived_.wait_for(lock, limit, [this] { return SomethingArrived(); });
  }
  std::swap(intake->submissions, submissions_);
  std::swap(intake->cancels, cancels_);
  intake->end_all = end_all_ || stop_;
  intake->stop = stop_;
  end_all_ = false;
}

void RequestQueue::NoteStarted() {
  std::lock_guard<std::mutex> lock(mutex_);
  ABSL_ASSERT(waiting_ > 0);
  --waiting_;
}

void RequestQueue::NoteEnded(bool was_started) {
  std::lock_guard<std::mutex> lock(mutex_);
  ABSL_ASSERT(active_ > 0);
  if (!was_started) --waiting_;
  const absl::Time now = absl::Now();
  const absl::Duration interval = std::max(now - last_end_, absl::ZeroDuration());
  pace_ = pace_ == absl::ZeroDuration() ? interval : pace_ * 0.9 + interval * 0.1;
  last_end_ = now;
  if (--active_ == 0) idle_.notify_all();
}

}  // namespace atp
