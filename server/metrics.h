// Prometheus metrics: what the engine reports, and gauges read at scrape time. Base units, prefix atp_, and
// the vllm: aliases that Kubernetes inference gateways route by. The list with meanings is in
// docs/metrics.md.
#ifndef ATP_SERVER_METRICS_H_
#define ATP_SERVER_METRICS_H_

#include <memory>
#include <string>
#include <string_view>

#include "absl/time/time.h"
#include "engine/engine.h"
#include "server/generate_service.h"

namespace atp {

class Metrics final : public EngineObserver {
 public:
  Metrics();
  ~Metrics() override;

  void OnStep(const StepReport& report) override;
  void OnStarted(absl::Duration queue_time) override;
  void OnFirstToken(absl::Duration since_submit) override;
  void OnInterTokenLatency(absl::Duration latency) override;
  void OnRequestFinished(const RequestReport& report) override;

  // Front ends. transport: "http" or "grpc"; code: "200", "INVALID_ARGUMENT", …; route: the pattern, never
  // the raw path.
  void OnResponse(std::string_view transport, std::string_view route, std::string_view code,
                  absl::Duration duration);
  void SetHttpConnections(int open);

  // From then on scrapes show the engine's gauges and the build and model info; until then atp_ready is 0.
  void Attach(const GenerateService* service);

  // Text exposition format 0.0.4.
  std::string Render();

 private:
  struct Families;
  std::unique_ptr<Families> families_;
};

}  // namespace atp

#endif  // ATP_SERVER_METRICS_H_
