#include "cli/stop_signals.h"

#include <pthread.h>
#include <signal.h>

#include <cstdlib>

#include "spdlog/spdlog.h"

namespace atp {
namespace {

constexpr int kWake = SIGUSR1;  // sent by the destructor, to end the thread

sigset_t Signals() {
  sigset_t set;
  sigemptyset(&set);
  for (const int signal : {SIGTERM, SIGINT, kWake}) sigaddset(&set, signal);
  return set;
}

const char* NameOf(int signal) { return signal == SIGTERM ? "SIGTERM" : "SIGINT"; }

[[noreturn]] void ExitNow(int code) {
  spdlog::default_logger()->flush();
  std::_Exit(code);  // no destructors: other threads are at work
}

}  // namespace

StopSignals::StopSignals() {
  signal(SIGPIPE, SIG_IGN);
  const sigset_t set = Signals();
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  thread_ = std::thread([this] { Run(); });
}

StopSignals::~StopSignals() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    done_ = true;
  }
  pthread_kill(thread_.native_handle(), kWake);
  thread_.join();
}

void StopSignals::Serving() {
  std::lock_guard<std::mutex> lock(mutex_);
  serving_ = true;
}

std::string StopSignals::Wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  stopped_.wait(lock, [this] { return !first_.empty(); });
  return first_;
}

void StopSignals::Stop(const std::string& reason) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (first_.empty()) first_ = reason;
  stopped_.notify_all();
}

void StopSignals::Run() {
  const sigset_t set = Signals();
  while (true) {
    int signal = 0;
    sigwait(&set, &signal);
    std::lock_guard<std::mutex> lock(mutex_);
    if (done_) return;
    if (signal == kWake) continue;
    if (!first_.empty()) {
      spdlog::warn("stopping now: second signal={}", NameOf(signal));
      ExitNow(128 + signal);
    }
    if (!serving_) {
      spdlog::info("stopping signal={} while loading", NameOf(signal));
      ExitNow(0);
    }
    first_ = NameOf(signal);
    stopped_.notify_all();
  }
}

}  // namespace atp
