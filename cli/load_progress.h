// Shows how far a model is loaded: a bar on a terminal, a log line now and then otherwise.
#ifndef ATP_CLI_LOAD_PROGRESS_H_
#define ATP_CLI_LOAD_PROGRESS_H_

#include <cstddef>
#include <string>

#include "absl/time/time.h"

namespace atp {

class LoadProgressBar {
 public:
  // `what`: "models/default". Draws on stderr when that is a terminal.
  explicit LoadProgressBar(std::string what);
  ~LoadProgressBar();

  void Update(size_t done_bytes, size_t total_bytes);  // cheap enough to be called for every tensor

 private:
  void Draw(size_t done_bytes, size_t total_bytes);

  std::string what_;
  bool terminal_;
  bool drawn_ = false;
  absl::Time started_;
  absl::Time shown_;
};

}  // namespace atp

#endif  // ATP_CLI_LOAD_PROGRESS_H_
