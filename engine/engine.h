// The engine as front ends see it: submit, cancel, drain, look. BatchingEngine runs a model; EchoEngine
// answers without one, so that front ends can be tested alone.
#ifndef ATP_ENGINE_ENGINE_H_
#define ATP_ENGINE_ENGINE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/request.h"
#include "kernels/op_args.h"

namespace atp {

// A snapshot, taken without stopping the engine.
struct EngineStats {
  int requests_running = 0;
  int requests_waiting = 0;  // not begun, or preempted
  int64_t kv_blocks_total = 0;
  int64_t kv_blocks_used = 0;    // held by live sequences
  int64_t kv_blocks_cached = 0;  // held by the prefix cache alone, free on demand
  size_t kv_block_bytes = 0;
  int64_t kv_tokens_capacity = 0;
  uint64_t preemptions_total = 0;
  uint64_t prefix_cache_queries_tokens_total = 0;
  uint64_t prefix_cache_hits_tokens_total = 0;
  // Compressed history of running sequences (zero where nothing is compressed). Blocks that several share
  // count for each; entries are summed over layers and kv heads.
  int64_t kv_exact_blocks = 0;
  int64_t kv_principal_blocks = 0;
  int64_t kv_query_blocks = 0;  // queries kept for the next fit
  int64_t kv_exact_entries = 0;
  int64_t kv_principal_entries = 0;
  int64_t kv_tokens_compressed = 0;      // tokens that are there as principal entries only
  int64_t kv_bytes_saved = 0;            // what those would take, less what their principal entries take
  uint64_t tokens_compressed_total = 0;  // tokens of segments that were fitted
  uint64_t segments_compressed_total = 0;
};

struct StepReport {
  int prefill_tokens = 0;
  int decode_tokens = 0;
  int sequences = 0;
  absl::Duration duration;
  // Segments compressed in this step: a report for each (segment, layer, kv head), and the time of all fits.
  // Valid during the call.
  std::span<const PrincipalFitReport> fits;
  absl::Duration fit_time;
};

struct RequestReport {
  FinishReason reason = FinishReason::kStop;
  Usage usage;
  absl::Duration queue_time;           // submit to first scheduled; to the end, if it never was
  bool started = false;                // whether it was scheduled at all
  absl::Duration time_to_first_token;  // zero when there was none
  absl::Duration request_time;         // submit to finish
};

// Told what happens, on the engine thread; must not block. server/metrics implements it.
class EngineObserver {
 public:
  virtual ~EngineObserver() = default;
  virtual void OnStep(const StepReport& report) = 0;
  // When it happens, which is long before the request's end: submit to first scheduled, and to the first
  // token.
  virtual void OnStarted(absl::Duration /*queue_time*/) {}
  virtual void OnFirstToken(absl::Duration /*since_submit*/) {}
  virtual void OnInterTokenLatency(absl::Duration latency) = 0;
  virtual void OnRequestFinished(const RequestReport& report) = 0;
};

class Engine {
 public:
  virtual ~Engine() = default;

  // Thread-safe; never blocks on the model. On success the sink receives everything; on failure, nothing.
  //   InvalidArgument    could never fit (the message has the numbers)
  //   ResourceExhausted  the waiting queue is full; try again later (RetryAfter)
  //   Unavailable        draining or stopped
  virtual absl::StatusOr<RequestId> Submit(Request request, std::shared_ptr<OutputSink> sink) = 0;

  // Thread-safe. The most new tokens after such a prompt that Submit does not refuse, from the cache's size
  // and the model's positions; where none fits, what the positions leave: Submit says why it refuses.
  virtual int MaxNewTokens(int prompt_tokens, const std::optional<CompressionOverride>& compression) = 0;

  // Thread-safe, any state, unknown ids are fine. The request ends with kCancelled and its blocks are free
  // within a step.
  virtual void Cancel(RequestId id) = 0;

  // Refuses new work at once and waits until the running requests are done; after `timeout` the rest end with
  // kShutdown. DeadlineExceeded (with their number) if some had to be ended so.
  virtual absl::Status Drain(absl::Duration timeout) = 0;

  virtual EngineStats Stats() const = 0;

  // How long a refused client had better wait: from the queue's length and the recent pace, at least a
  // second.
  virtual absl::Duration RetryAfter() const = 0;
};

}  // namespace atp

#endif  // ATP_ENGINE_ENGINE_H_
