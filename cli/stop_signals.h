// SIGTERM and SIGINT, taken by a thread of their own: no code runs inside a signal handler.
#ifndef ATP_CLI_STOP_SIGNALS_H_
#define ATP_CLI_STOP_SIGNALS_H_

#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace atp {

class StopSignals {
 public:
  // Before any other thread starts: threads inherit that the signals are blocked. Also ignores SIGPIPE, so
  // that a client that goes away is an error of write().
  StopSignals();
  ~StopSignals();

  // Until Serving() a signal ends the process at once, with exit code 0: there is nothing to finish yet.
  void Serving();
  // Waits for the first signal and returns its name. The second one ends the process at once, with exit code
  // 128 + signal.
  std::string Wait();

 private:
  void Run();

  absl::Mutex mutex_;
  bool serving_ ABSL_GUARDED_BY(mutex_) = false;
  bool done_ ABSL_GUARDED_BY(mutex_) = false;
  int first_ ABSL_GUARDED_BY(mutex_) = 0;  // the signal; 0: none yet
  std::thread thread_;
};

}  // namespace atp

#endif  // ATP_CLI_STOP_SIGNALS_H_
