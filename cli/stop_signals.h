// SIGTERM and SIGINT, taken by a thread of their own: no code runs inside a signal handler.
#ifndef ATP_CLI_STOP_SIGNALS_H_
#define ATP_CLI_STOP_SIGNALS_H_

#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>

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
  // As the first signal does, from any thread: Wait() returns `reason`.
  void Stop(const std::string& reason);

 private:
  void Run();

  std::mutex mutex_;                 // guards all below but the thread
  std::condition_variable stopped_;  // first_ is set
  bool serving_ = false;
  bool done_ = false;
  std::string first_;  // the signal's name, or the reason; "": none yet
  std::thread thread_;
};

}  // namespace atp

#endif  // ATP_CLI_STOP_SIGNALS_H_
