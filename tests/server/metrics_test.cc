#include "server/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "tests/server/byte_tokenizer.h"
#include "tests/server/fake_engine.h"

namespace atp {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

class MetricsTest : public ::testing::Test {
 protected:
  MetricsTest() {
    ServedModel model;
    model.id = "tiny \"quoted\"";
    model.max_context_tokens = 100;
    model.vocab_size = 258;
    model.device = "cpu test";
    service_ = std::make_unique<GenerateService>(&engine_, &tokenizer_, *ChatTemplate::Create("plain"), model,
                                                 Config());
    service_->SetReady(true);
  }
  void FeedEverything() {
    metrics_.Attach(service_.get());
    metrics_.OnStep({30, 2, 3, absl::Milliseconds(40), {}, absl::ZeroDuration()});
    metrics_.OnStarted(absl::Milliseconds(3));
    metrics_.OnFirstToken(absl::Milliseconds(70));
    metrics_.OnInterTokenLatency(absl::Milliseconds(20));
    RequestReport report;
    report.started = true;
    report.reason = FinishReason::kLength;
    report.usage = {5, 7, 4};
    report.queue_time = absl::Milliseconds(3);
    report.time_to_first_token = absl::Milliseconds(70);
    report.request_time = absl::Seconds(2);
    metrics_.OnRequestFinished(report);
    metrics_.OnResponse("http", "/v1/completions", "200", absl::Seconds(2));
    metrics_.OnResponse("grpc", "/atp.v1.Inference/Generate", "INVALID_ARGUMENT", absl::Milliseconds(1));
    metrics_.SetHttpConnections(3);
  }
  // Every family of the exposition and its type.
  static std::map<std::string, std::string> Types(const std::string& text) {
    std::map<std::string, std::string> types;
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
      std::istringstream words(line);
      std::string hash, keyword, name, type;
      if (words >> hash >> keyword >> name >> type && hash == "#" && keyword == "TYPE") types[name] = type;
    }
    return types;
  }
  // The first two columns of the table in docs/metrics.md.
  static std::map<std::string, std::string> Documented() {
    std::map<std::string, std::string> types;
    std::ifstream file(ATP_SOURCE_DIR "/docs/metrics.md");
    EXPECT_TRUE(file.good()) << "docs/metrics.md";
    for (std::string line; std::getline(file, line);) {
      if (line.rfind("| `", 0) != 0) continue;
      const size_t end = line.find('`', 3);
      const size_t type = line.find("| ", end) + 2;
      types[line.substr(3, end - 3)] = line.substr(type, line.find(" |", type) - type);
    }
    return types;
  }

  testing::FakeEngine engine_;
  testing::ByteTokenizer tokenizer_;
  std::unique_ptr<GenerateService> service_;
  Metrics metrics_;
};

TEST_F(MetricsTest, DocumentationAndExpositionAgree) {
  FeedEverything();
  const std::map<std::string, std::string> documented = Documented();
  EXPECT_GT(documented.size(), 25u);
  EXPECT_EQ(Types(metrics_.Render()), documented);
}

TEST_F(MetricsTest, EveryFamilyHasHelpAndAProperName) {
  FeedEverything();
  const std::string text = metrics_.Render();
  for (const auto& [name, type] : Types(text)) {
    EXPECT_THAT(text, HasSubstr("# HELP " + name + " "));
    const bool prefixed =
        name.rfind("atp_", 0) == 0 || name.rfind("vllm:", 0) == 0 || name.rfind("process_", 0) == 0;
    EXPECT_TRUE(prefixed) << name;
    const bool is_total = name.size() > 6 && name.compare(name.size() - 6, 6, "_total") == 0;
    EXPECT_EQ(is_total, type == "counter") << name;
  }
}

TEST_F(MetricsTest, RequestsAndStepsAreCounted) {
  FeedEverything();
  const std::string text = metrics_.Render();
  for (const char* line : {
           "atp_prompt_tokens_total 5\n",
           "atp_generation_tokens_total 7\n",
           "atp_requests_finished_total{reason=\"length\"} 1\n",
           "atp_requests_finished_total{reason=\"stop\"} 0\n",
           "atp_time_to_first_token_seconds_count 1\n",
           "atp_time_to_first_token_seconds_bucket{le=\"0.06\"} 0\n",
           "atp_time_to_first_token_seconds_bucket{le=\"0.08\"} 1\n",
           "atp_queue_time_seconds_bucket{le=\"0.005\"} 1\n",
           "atp_request_duration_seconds_sum 2\n",
           "atp_inter_token_latency_seconds_count 1\n",
           "atp_batch_size_sum 3\n",
           "atp_step_tokens_sum 32\n",
           "atp_step_duration_seconds_count 1\n",
           "atp_http_connections 3\n",
           "atp_http_request_duration_seconds_count{route=\"/v1/completions\"} 1\n",
           "atp_grpc_request_duration_seconds_count{route=\"/atp.v1.Inference/Generate\"} 1\n",
       }) {
    EXPECT_THAT(text, HasSubstr(line));
  }
  EXPECT_THAT(
      text,
      HasSubstr("code=\"INVALID_ARGUMENT\",route=\"/atp.v1.Inference/Generate\",transport=\"grpc\"} 1\n"));
}

TEST_F(MetricsTest, FitsAreObservedByTheirMeanAndTheirWorst) {
  // Mass, output; the third kept its entries: its numbers say nothing.
  const std::vector<PrincipalFitReport> fits = {
      {0.25f, 0.125f, true}, {0.5f, 0.0625f, true}, {8.0f, 8.0f, false}, {0.75f, 0.0625f, true}};
  metrics_.OnStep({30, 2, 3, absl::Milliseconds(40), fits, absl::Milliseconds(125)});
  const std::string text = metrics_.Render();
  for (const char* line : {
           "atp_fit_duration_seconds_count 1\n",
           "atp_fit_duration_seconds_sum 0.125\n",
           "atp_fit_mass_residual_count{statistic=\"mean\"} 1\n",
           "atp_fit_mass_residual_sum{statistic=\"mean\"} 0.5\n",
           "atp_fit_mass_residual_count{statistic=\"worst\"} 1\n",
           "atp_fit_mass_residual_sum{statistic=\"worst\"} 0.75\n",
           "atp_fit_output_residual_count{statistic=\"mean\"} 1\n",
           "atp_fit_output_residual_bucket{statistic=\"mean\",le=\"0.075\"} 0\n",
           "atp_fit_output_residual_bucket{statistic=\"mean\",le=\"0.1\"} 1\n",
           "atp_fit_output_residual_sum{statistic=\"worst\"} 0.125\n",
       }) {
    EXPECT_THAT(text, HasSubstr(line));
  }
}

TEST_F(MetricsTest, StepsWithoutFitsAreNotObservedAsFits) {
  metrics_.OnStep({30, 2, 3, absl::Milliseconds(40), {}, absl::ZeroDuration()});
  EXPECT_THAT(metrics_.Render(), HasSubstr("atp_fit_duration_seconds_count 0\n"));
  // Every fit kept its entries: that took time, and there is no error to speak of.
  const std::vector<PrincipalFitReport> kept = {{0, 0, false}, {0, 0, false}};
  metrics_.OnStep({30, 2, 3, absl::Milliseconds(40), kept, absl::Milliseconds(1)});
  const std::string text = metrics_.Render();
  EXPECT_THAT(text, HasSubstr("atp_fit_duration_seconds_count 1\n"));
  for (const char* name : {"atp_fit_mass_residual", "atp_fit_output_residual"}) {
    for (const char* statistic : {"mean", "worst"}) {
      EXPECT_THAT(text, HasSubstr(std::string(name) + "_count{statistic=\"" + statistic + "\"} 0\n"));
    }
  }
}

TEST_F(MetricsTest, WaitingTimesAreSeenWhenTheyHappenAndOnce) {
  metrics_.OnStarted(absl::Milliseconds(3));
  metrics_.OnFirstToken(absl::Milliseconds(70));
  std::string text = metrics_.Render();
  EXPECT_THAT(text, HasSubstr("atp_queue_time_seconds_count 1\n"));
  EXPECT_THAT(text, HasSubstr("atp_time_to_first_token_seconds_count 1\n"));
  RequestReport report;
  report.started = true;
  report.time_to_first_token = absl::Milliseconds(70);
  metrics_.OnRequestFinished(report);
  report = {};  // its deadline passed in the queue
  report.reason = FinishReason::kDeadline;
  report.queue_time = absl::Seconds(9);
  metrics_.OnRequestFinished(report);
  text = metrics_.Render();
  EXPECT_THAT(text, HasSubstr("atp_queue_time_seconds_count 2\n"));
  EXPECT_THAT(text, HasSubstr("atp_queue_time_seconds_sum 9.003\n"));
  EXPECT_THAT(text, HasSubstr("atp_time_to_first_token_seconds_count 1\n"));
}

TEST_F(MetricsTest, ARequestWithoutATokenHasNoTimeToFirstToken) {
  RequestReport report;
  report.reason = FinishReason::kCancelled;
  metrics_.OnRequestFinished(report);
  const std::string text = metrics_.Render();
  EXPECT_THAT(text, HasSubstr("atp_time_to_first_token_seconds_count 0\n"));
  EXPECT_THAT(text, HasSubstr("atp_request_duration_seconds_count 1\n"));
  EXPECT_THAT(text, HasSubstr("atp_requests_finished_total{reason=\"cancelled\"} 1\n"));
}

TEST_F(MetricsTest, GaugesAreReadFromTheEngineAtScrapeTime) {
  EXPECT_THAT(metrics_.Render(),
              Not(HasSubstr("atp_kv_cache_blocks")));  // no model yet: not zero, but absent
  EXPECT_THAT(metrics_.Render(), HasSubstr("atp_ready 0\n"));
  metrics_.Attach(service_.get());
  const std::string text = metrics_.Render();
  for (const char* line :
       {"atp_ready 1\n", "atp_kv_cache_blocks 100\n", "atp_kv_cache_usage_ratio 0\n",
        "atp_preemptions_total 3\n", "atp_prefix_cache_queried_tokens_total 40\n",
        "atp_prefix_cache_hit_tokens_total 10\n", "atp_build_info{version=\"",
        "atp_kv_entries{kind=\"exact\"} 640\n", "atp_kv_entries{kind=\"principal\"} 96\n",
        "atp_kv_principal_blocks 6\n", "atp_kv_bytes_saved 4096\n", "atp_tokens_compressed_total 256\n",
        "vllm:num_requests_waiting{model_name=\"tiny \\\"quoted\\\"\"} 0\n"}) {
    EXPECT_THAT(text, HasSubstr(line));
  }
  EXPECT_THAT(text, HasSubstr("device=\"cpu test\""));
  service_->SetReady(false);
  EXPECT_THAT(metrics_.Render(), HasSubstr("atp_ready 0\n"));
}

}  // namespace
}  // namespace atp
