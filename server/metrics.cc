#include "server/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace atp {
namespace {

using Buckets = prometheus::Histogram::BucketBoundaries;

// Seconds. Each spans from what a small model on an idle machine does to what somebody should be woken for.
const Buckets kFirstTokenBuckets = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5,
                                    0.75,  1,     2.5,  5,    7.5,  10,   20,   40,  80,   160};
const Buckets kInterTokenBuckets = {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05,
                                    0.075,  0.1,   0.15,   0.2,   0.3,  0.4,   0.5,  0.75,  1,    2.5,  10};
const Buckets kQueueBuckets = {0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1,
                               2.5,   5,     10,   30,   60,  120,  300, 600};
const Buckets kRequestBuckets = {0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1,   2.5,
                                 5,     10,   20,    30,   60,  120,  240, 480, 960};
const Buckets kStepBuckets = {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10};
const Buckets kFitBuckets = {0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025,
                             0.05,   0.1,     0.25,   0.5,   1,      2.5,   5,    10};
const Buckets kBatchBuckets = {1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024};
const Buckets kTokenBuckets = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};
// Relative errors: up to 1 where a fit is of any use.
const Buckets kResidualBuckets = {0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05,
                                  0.075,  0.1,     0.15,   0.2,   0.3,    0.4,   0.5,  0.75, 1,    2};

constexpr std::array<std::pair<FinishReason, const char*>, 6> kFinishReasons = {{
    {FinishReason::kStop, "stop"},
    {FinishReason::kLength, "length"},
    {FinishReason::kCancelled, "cancelled"},
    {FinishReason::kDeadline, "deadline"},
    {FinishReason::kShutdown, "shutdown"},
    {FinishReason::kError, "error"},
}};

// One sample that is computed at scrape time, with its family around it.
prometheus::MetricFamily Family(prometheus::MetricType type, std::string name, std::string help, double value,
                                const prometheus::Labels& labels) {
  prometheus::ClientMetric metric;
  for (const auto& [key, label] : labels) metric.label.push_back({key, label});
  if (type == prometheus::MetricType::Counter) {
    metric.counter.value = value;
  } else {
    metric.gauge.value = value;
  }
  return {std::move(name), std::move(help), type, {std::move(metric)}};
}

// What the running sequences hold of their history, exact and compressed.
void AddCompressionFamilies(const EngineStats& stats, std::vector<prometheus::MetricFamily>* out) {
  using prometheus::MetricType;
  const auto principal = static_cast<double>(stats.kv_principal_entries);
  prometheus::MetricFamily entries = Family(MetricType::Gauge, "atp_kv_entries",
                                            "KV entries that running requests attend to, summed over layers "
                                            "and kv heads, by kind: exact (one for each "
                                            "token) or principal (compressed).",
                                            static_cast<double>(stats.kv_exact_entries), {{"kind", "exact"}});
  entries.metric.push_back(
      Family(MetricType::Gauge, "", "", principal, {{"kind", "principal"}}).metric.front());
  out->push_back(std::move(entries));
  out->push_back(
      Family(MetricType::Gauge, "atp_kv_principal_blocks",
             "KV cache blocks of principal entries that running requests hold; a shared one counts for each.",
             static_cast<double>(stats.kv_principal_blocks), {}));
  out->push_back(
      Family(MetricType::Gauge, "atp_kv_bytes_saved",
             "Bytes that the compressed tokens of running requests would take in the KV cache, less what "
             "their principal entries take.",
             static_cast<double>(stats.kv_bytes_saved), {}));
  out->push_back(Family(MetricType::Counter, "atp_tokens_compressed_total",
                        "Tokens of segments that were compressed.",
                        static_cast<double>(stats.tokens_compressed_total), {}));
}

std::vector<prometheus::MetricFamily> EngineFamilies(const GenerateService& service) {
  using prometheus::MetricType;
  std::vector<prometheus::MetricFamily> out;
  auto gauge = [&out](std::string name, std::string help, double value, prometheus::Labels labels = {}) {
    out.push_back(Family(MetricType::Gauge, std::move(name), std::move(help), value, labels));
  };
  auto counter = [&out](std::string name, std::string help, uint64_t value) {
    out.push_back(
        Family(MetricType::Counter, std::move(name), std::move(help), static_cast<double>(value), {}));
  };
  const EngineStats stats = service.Stats();
  const ServedModel& model = service.model();
  const double usage = stats.kv_blocks_total > 0 ? static_cast<double>(stats.kv_blocks_used) /
                                                       static_cast<double>(stats.kv_blocks_total)
                                                 : 0.0;
  gauge("atp_requests_running", "Requests in the running batch.", stats.requests_running);
  gauge("atp_requests_waiting", "Requests that wait for a place in the batch, preempted ones too.",
        stats.requests_waiting);
  gauge("atp_kv_cache_blocks", "Blocks of the KV cache.", static_cast<double>(stats.kv_blocks_total));
  gauge("atp_kv_cache_blocks_used", "KV cache blocks held by live requests.",
        static_cast<double>(stats.kv_blocks_used));
  gauge("atp_kv_cache_blocks_cached", "KV cache blocks held by the prefix cache alone, free on demand.",
        static_cast<double>(stats.kv_blocks_cached));
  gauge("atp_kv_cache_block_bytes", "Bytes of one KV cache block.",
        static_cast<double>(stats.kv_block_bytes));
  gauge("atp_kv_cache_capacity_tokens", "Tokens that fit into the KV cache.",
        static_cast<double>(stats.kv_tokens_capacity));
  gauge("atp_kv_cache_usage_ratio", "Share of the KV cache blocks that live requests hold, 0 to 1.", usage);
  counter("atp_preemptions_total", "Running requests that were put back for want of KV cache blocks.",
          stats.preemptions_total);
  counter("atp_prefix_cache_queried_tokens_total", "Prompt tokens that were looked up in the prefix cache.",
          stats.prefix_cache_queries_tokens_total);
  counter("atp_prefix_cache_hit_tokens_total", "Prompt tokens that the prefix cache had.",
          stats.prefix_cache_hits_tokens_total);
  AddCompressionFamilies(stats, &out);

  gauge("atp_build_info", "Always 1; the labels tell the version.", 1,
        {{"version", std::string(AtpVersion())}});
  gauge("atp_model_info", "Always 1; the labels tell the served model.", 1,
        {{"model_name", model.id},
         {"device", model.device},
         {"max_context_tokens", absl::StrCat(model.max_context_tokens)},
         {"vocab_size", absl::StrCat(model.vocab_size)}});

  const prometheus::Labels name = {{"model_name", model.id}};
  gauge("vllm:num_requests_running", "Alias of atp_requests_running for inference gateways.",
        stats.requests_running, name);
  gauge("vllm:num_requests_waiting", "Alias of atp_requests_waiting for inference gateways.",
        stats.requests_waiting, name);
  gauge("vllm:kv_cache_usage_perc", "Alias of atp_kv_cache_usage_ratio for inference gateways (1 = full).",
        usage, name);
  return out;
}

// The two observations of one residual in a step, however many fits it had.
struct ResidualHistograms {
  prometheus::Histogram& mean;
  prometheus::Histogram& worst;

  // The fits that were done; those that kept their entries as they are have no error to report.
  void Observe(std::span<const PrincipalFitReport> fits, float PrincipalFitReport::*residual) const {
    double sum = 0, largest = 0;
    int fitted = 0;
    for (const PrincipalFitReport& fit : fits) {
      if (!fit.fitted) continue;
      sum += fit.*residual;
      largest = std::max<double>(largest, fit.*residual);
      ++fitted;
    }
    if (fitted == 0) return;
    mean.Observe(sum / fitted);
    worst.Observe(largest);
  }
};

}  // namespace

struct Metrics::Families {
  prometheus::Registry registry;
  std::atomic<const GenerateService*> service{nullptr};

  prometheus::Counter& prompt_tokens = Counter(
      "atp_prompt_tokens_total", "Prompt tokens of finished requests that were begun, cached ones included.");
  prometheus::Counter& generation_tokens =
      Counter("atp_generation_tokens_total", "Generated tokens of finished requests.");
  prometheus::Family<prometheus::Counter>& finished = prometheus::BuildCounter()
                                                          .Name("atp_requests_finished_total")
                                                          .Help("Requests that ended, by reason.")
                                                          .Register(registry);
  std::array<prometheus::Counter*, kFinishReasons.size()> finished_by_reason;
  prometheus::Family<prometheus::Counter>& responses =
      prometheus::BuildCounter()
          .Name("atp_responses_total")
          .Help("Answers to clients, by transport, route and status code.")
          .Register(registry);

  prometheus::Histogram& first_token =
      Histogram("atp_time_to_first_token_seconds", "From submit to the first token.", kFirstTokenBuckets);
  prometheus::Histogram& inter_token =
      Histogram("atp_inter_token_latency_seconds", "Between two tokens of one answer.", kInterTokenBuckets);
  prometheus::Histogram& queue_time =
      Histogram("atp_queue_time_seconds",
                "From submit to first scheduled, or to the end of a request that never was.", kQueueBuckets);
  prometheus::Histogram& request_duration =
      Histogram("atp_request_duration_seconds", "From submit to the end of the request.", kRequestBuckets);
  prometheus::Histogram& batch_size =
      Histogram("atp_batch_size", "Sequences in an engine step.", kBatchBuckets);
  prometheus::Histogram& step_tokens =
      Histogram("atp_step_tokens", "Tokens in an engine step, prefill and decode together.", kTokenBuckets);
  prometheus::Histogram& step_duration =
      Histogram("atp_step_duration_seconds", "Duration of an engine step.", kStepBuckets);
  prometheus::Histogram& fit_duration =
      Histogram("atp_fit_duration_seconds", "Time of all fits of an engine step that compressed segments.",
                kFitBuckets);
  ResidualHistograms fit_mass_residual = Residuals(
      "atp_fit_mass_residual",
      "Relative root mean square error of the softmax mass over a fit's references; two observations for "
      "each engine step that compressed: the mean of its fits and the worst.");
  ResidualHistograms fit_output_residual = Residuals(
      "atp_fit_output_residual",
      "Relative Frobenius error of the attention output over a fit's references; two observations for "
      "each engine step that compressed: the mean of its fits and the worst.");
  prometheus::Family<prometheus::Histogram>& http_duration =
      prometheus::BuildHistogram()
          .Name("atp_http_request_duration_seconds")
          .Help("From the whole HTTP request to the end of its answer, by route.")
          .Register(registry);
  prometheus::Family<prometheus::Histogram>& grpc_duration =
      prometheus::BuildHistogram()
          .Name("atp_grpc_request_duration_seconds")
          .Help("From the start of a gRPC call to its status, by route.")
          .Register(registry);

  prometheus::Gauge& http_connections = Gauge("atp_http_connections", "Open HTTP connections.");
  prometheus::Gauge& start_time =
      Gauge("process_start_time_seconds", "When the server started, in seconds since the Unix epoch.");

  Families() {
    for (size_t i = 0; i < kFinishReasons.size(); ++i) {
      finished_by_reason[i] = &finished.Add({{"reason", kFinishReasons[i].second}});
    }
    start_time.Set(absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch()));
  }

  prometheus::Counter& Counter(const char* name, const char* help) {
    return prometheus::BuildCounter().Name(name).Help(help).Register(registry).Add({});
  }
  prometheus::Gauge& Gauge(const char* name, const char* help) {
    return prometheus::BuildGauge().Name(name).Help(help).Register(registry).Add({});
  }
  prometheus::Histogram& Histogram(const char* name, const char* help, const Buckets& buckets) {
    return prometheus::BuildHistogram().Name(name).Help(help).Register(registry).Add({}, buckets);
  }
  ResidualHistograms Residuals(const char* name, const char* help) {
    auto& family = prometheus::BuildHistogram().Name(name).Help(help).Register(registry);
    return {family.Add({{"statistic", "mean"}}, kResidualBuckets),
            family.Add({{"statistic", "worst"}}, kResidualBuckets)};
  }
};

Metrics::Metrics() : families_(std::make_unique<Families>()) {}
Metrics::~Metrics() = default;

void Metrics::OnStep(const StepReport& report) {
  families_->batch_size.Observe(report.sequences);
  families_->step_tokens.Observe(report.prefill_tokens + report.decode_tokens);
  families_->step_duration.Observe(absl::ToDoubleSeconds(report.duration));
  if (report.fits.empty()) return;
  families_->fit_duration.Observe(absl::ToDoubleSeconds(report.fit_time));
  families_->fit_mass_residual.Observe(report.fits, &PrincipalFitReport::mass_residual);
  families_->fit_output_residual.Observe(report.fits, &PrincipalFitReport::output_residual);
}

void Metrics::OnStarted(absl::Duration queue_time) {
  families_->queue_time.Observe(absl::ToDoubleSeconds(queue_time));
}

void Metrics::OnFirstToken(absl::Duration since_submit) {
  families_->first_token.Observe(absl::ToDoubleSeconds(since_submit));
}

void Metrics::OnInterTokenLatency(absl::Duration latency) {
  families_->inter_token.Observe(absl::ToDoubleSeconds(latency));
}

void Metrics::OnRequestFinished(const RequestReport& report) {
  if (report.started) families_->prompt_tokens.Increment(report.usage.prompt_tokens);
  families_->generation_tokens.Increment(report.usage.completion_tokens);
  for (size_t i = 0; i < kFinishReasons.size(); ++i) {
    if (kFinishReasons[i].first == report.reason) families_->finished_by_reason[i]->Increment();
  }
  // Those that ended in the queue waited, too.
  if (!report.started) families_->queue_time.Observe(absl::ToDoubleSeconds(report.queue_time));
  families_->request_duration.Observe(absl::ToDoubleSeconds(report.request_time));
}

void Metrics::OnResponse(std::string_view transport, std::string_view route, std::string_view code,
                         absl::Duration duration) {
  families_->responses
      .Add(
          {{"transport", std::string(transport)}, {"route", std::string(route)}, {"code", std::string(code)}})
      .Increment();
  auto& durations = transport == "grpc" ? families_->grpc_duration : families_->http_duration;
  durations.Add({{"route", std::string(route)}}, kRequestBuckets).Observe(absl::ToDoubleSeconds(duration));
}

void Metrics::SetHttpConnections(int open) { families_->http_connections.Set(open); }

void Metrics::Attach(const GenerateService* service) { families_->service.store(service); }

std::string Metrics::Render() {
  std::vector<prometheus::MetricFamily> all = families_->registry.Collect();
  const GenerateService* const service = families_->service.load();
  all.push_back(Family(prometheus::MetricType::Gauge, "atp_ready",
                       "1 while the server takes requests, 0 while it loads and while it drains.",
                       service != nullptr && service->ready() ? 1 : 0, {}));
  if (service != nullptr) {
    for (prometheus::MetricFamily& family : EngineFamilies(*service)) all.push_back(std::move(family));
  }
  return prometheus::TextSerializer().Serialize(all);
}

}  // namespace atp
