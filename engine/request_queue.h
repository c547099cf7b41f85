// Where front ends' threads hand over to the engine's one thread: requests, cancellations, drain and stop go
// in; the engine takes them all at once and sleeps here while it has nothing to do. Thread-safe.
#ifndef ATP_ENGINE_REQUEST_QUEUE_H_
#define ATP_ENGINE_REQUEST_QUEUE_H_

#include <condition_variable>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/request.h"

namespace atp {

class CompressionPlan;

struct Submission {
  RequestId id = 0;
  std::shared_ptr<const Request> request;
  std::shared_ptr<OutputSink> sink;
  std::shared_ptr<const CompressionPlan> plan;  // how its history is compressed; null: exact
  absl::Time submitted;
};

class RequestQueue {
 public:
  // `max_waiting` bounds the requests that were pushed and neither started nor ended: here or in the engine's
  // hands.
  // `max_active`, those and the started ones: preempted ones wait, too, but are not counted again.
  explicit RequestQueue(int max_waiting, int64_t max_active = std::numeric_limits<int64_t>::max())
      : max_waiting_(max_waiting), max_active_(max_active) {}

  // --- any thread but the engine's ---

  // ResourceExhausted when full, Unavailable when closed.
  absl::StatusOr<RequestId> Push(Request request, std::shared_ptr<OutputSink> sink,
                                 std::shared_ptr<const CompressionPlan> plan = nullptr);
  void Cancel(RequestId id);  // any thread, the engine's too
  // Closes, waits until every request has ended, and after `timeout` tells the engine to end the rest (and
  // waits for that, too). DeadlineExceeded, with the number, when there was a rest. Can be called again, by
  // many.
  absl::Status Drain(absl::Duration timeout);
  // From now on Push() says Unavailable(why). Any thread, the engine's too.
  void Close(std::string why);
  // Closes, and tells the engine to end everything and to leave. Returns at once.
  void Stop();

  int waiting() const;
  int active() const;  // waiting or started, not ended
  // A guess at when there is room again: waiting requests times the recent mean time between ends, in [1 s,
  // 60 s].
  absl::Duration RetryAfter() const;

  // --- the engine's thread ---

  struct Intake {
    std::vector<Submission> submissions;  // oldest first
    std::vector<RequestId> cancels;       // may name the submissions above, or nobody any more
    bool end_all = false;                 // end every request now, with kShutdown
    bool stop = false;                    // and leave
  };
  // Moves what arrived into `intake`. With `wait` it sleeps until something has arrived, or until `until`.
  void Take(bool wait, absl::Time until, Intake* intake);
  void NoteStarted();                // a waiting request has its first step
  void NoteEnded(bool was_started);  // a request has ended, all its answers

 private:
  bool SomethingArrived() const { return !submissions_.empty() || !cancels_.empty() || end_all_ || stop_; }

  const int max_waiting_;
  const int64_t max_active_;
  mutable std::mutex mutex_;
  std::condition_variable arrived_;
  std::condition_variable idle_;  // active_ is 0
  std::vector<Submission> submissions_;
  std::vector<RequestId> cancels_;
  bool closed_ = false;
  std::string why_closed_ = "the server is shutting down and takes no new requests";
  bool end_all_ = false;
  bool stop_ = false;
  int waiting_ = 0;
  int active_ = 0;
  absl::Time last_end_ = absl::InfinitePast();  // or when work began after an idle time
  absl::Duration pace_ = absl::ZeroDuration();  // smoothed time between ends while there is work
};

}  // namespace atp

#endif  // ATP_ENGINE_REQUEST_QUEUE_H_
