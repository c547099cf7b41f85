#include "engine/request_queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"

namespace atp {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

TEST(RequestQueueTest, HandsOverInOrder) {
  RequestQueue queue(10);
  const absl::StatusOr<RequestId> a = queue.Push(Request(), nullptr);
  const absl::StatusOr<RequestId> b = queue.Push(Request(), nullptr);
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_NE(*a, 0u);
  queue.Cancel(*a);
  RequestQueue::Intake intake;
  queue.Take(/*wait=*/true, absl::InfiniteFuture(), &intake);
  ASSERT_EQ(intake.submissions.size(), 2u);
  EXPECT_EQ(intake.submissions[0].id, *a);
  EXPECT_EQ(intake.submissions[1].id, *b);
  EXPECT_THAT(intake.cancels, ElementsAre(*a));
  EXPECT_FALSE(intake.end_all);
  EXPECT_FALSE(intake.stop);
  queue.Take(/*wait=*/false, absl::InfiniteFuture(), &intake);
  EXPECT_TRUE(intake.submissions.empty());
  EXPECT_TRUE(intake.cancels.empty());
}

TEST(RequestQueueTest, BoundsWhatWaitsWhereverItIs) {
  RequestQueue queue(2);
  ASSERT_TRUE(queue.Push(Request(), nullptr).ok());
  ASSERT_TRUE(queue.Push(Request(), nullptr).ok());
  RequestQueue::Intake intake;
  queue.Take(false, absl::InfiniteFuture(), &intake);  // the engine has them, and they wait there
  const absl::StatusOr<RequestId> refused = queue.Push(Request(), nullptr);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("scheduler.max_waiting_requests (2)"));
  queue.NoteStarted();
  EXPECT_EQ(queue.waiting(), 1);
  EXPECT_EQ(queue.active(), 2);
  EXPECT_TRUE(queue.Push(Request(), nullptr).ok());
  queue.NoteEnded(/*was_started=*/false);  // cancelled while it waited
  EXPECT_TRUE(queue.Push(Request(), nullptr).ok());
  EXPECT_FALSE(queue.Push(Request(), nullptr).ok());
}

// Requests that began and were preempted wait again, and no longer count as waiting.
TEST(RequestQueueTest, BoundsWhatLives) {
  RequestQueue queue(/*max_waiting=*/2, /*max_active=*/3);
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(queue.Push(Request(), nullptr).ok());
    queue.NoteStarted();
  }
  const absl::Status refused = queue.Push(Request(), nullptr).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("(3 together)"));
  queue.NoteEnded(/*was_started=*/true);
  EXPECT_TRUE(queue.Push(Request(), nullptr).ok());
}

TEST(RequestQueueTest, TakeWakesUp) {
  RequestQueue queue(10);
  std::atomic<int> taken{0};
  std::thread engine([&] {
    RequestQueue::Intake intake;
    while (!intake.stop) {
      queue.Take(true, absl::InfiniteFuture(), &intake);
      taken += static_cast<int>(intake.submissions.size() + intake.cancels.size());
    }
  });
  ASSERT_TRUE(queue.Push(Request(), nullptr).ok());
  while (taken < 1) std::this_thread::yield();
  queue.Cancel(1);
  while (taken < 2) std::this_thread::yield();
  queue.Stop();
  engine.join();
  EXPECT_EQ(queue.Push(Request(), nullptr).status().code(), absl::StatusCode::kUnavailable);
}

TEST(RequestQueueTest, TakeReturnsAtItsTimeWithNothing) {
  RequestQueue queue(10);
  RequestQueue::Intake intake;
  queue.Take(true, absl::Now() + absl::Milliseconds(5), &intake);
  EXPECT_TRUE(intake.submissions.empty());
}

TEST(RequestQueueTest, DrainWaitsForTheEnd) {
  RequestQueue queue(10);
  EXPECT_EQ(RequestQueue(10).Drain(absl::ZeroDuration()), absl::OkStatus());
  ASSERT_TRUE(queue.Push(Request(), nullptr).ok());
  std::thread engine([&] {
    RequestQueue::Intake intake;
    queue.Take(true, absl::InfiniteFuture(), &intake);
    while (queue.Push(Request(), nullptr).ok()) queue.NoteEnded(false);  // until drain has closed it
    queue.NoteStarted();
    queue.NoteEnded(true);
  });
  EXPECT_EQ(queue.Drain(absl::InfiniteDuration()), absl::OkStatus());
  EXPECT_EQ(queue.active(), 0);
  engine.join();
}

TEST(RequestQueueTest, DrainEndsTheRestAfterItsTime) {
  RequestQueue queue(10);
  ASSERT_TRUE(queue.Push(Request(), nullptr).ok());
  ASSERT_TRUE(queue.Push(Request(), nullptr).ok());
  std::thread engine([&] {
    RequestQueue::Intake intake;
    while (!intake.end_all) queue.Take(true, absl::InfiniteFuture(), &intake);
    EXPECT_FALSE(intake.stop);
    queue.NoteEnded(false);
    queue.NoteEnded(false);
  });
  const absl::Status drained = queue.Drain(absl::Milliseconds(5));
  EXPECT_EQ(drained.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(drained.message()), HasSubstr("2 requests"));
  engine.join();
}

TEST(RequestQueueTest, RetryAfterIsAtLeastASecond) {
  RequestQueue queue(10);
  EXPECT_EQ(queue.RetryAfter(), absl::Seconds(1));
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(queue.Push(Request(), nullptr).ok());
  queue.NoteEnded(false);
  EXPECT_GE(queue.RetryAfter(), absl::Seconds(1));
  EXPECT_LE(queue.RetryAfter(), absl::Minutes(1));
}

TEST(RequestQueueTest, ManyThreadsLoseNothing) {
  constexpr int kThreads = 8;
  constexpr int kEach = 500;
  RequestQueue queue(64);
  std::atomic<int> pushed{0};
  std::atomic<int> refused{0};
  std::set<RequestId> seen;
  size_t cancels = 0;
  std::thread engine([&] {
    RequestQueue::Intake intake;
    while (!intake.stop) {
      queue.Take(true, absl::InfiniteFuture(), &intake);
      for (const Submission& submission : intake.submissions) {
        EXPECT_TRUE(seen.insert(submission.id).second);
        queue.NoteStarted();
        queue.NoteEnded(true);
      }
      cancels += intake.cancels.size();
    }
  });
  std::vector<std::thread> clients;
  for (int t = 0; t < kThreads; ++t) {
    clients.emplace_back([&] {
      for (int i = 0; i < kEach; ++i) {
        const absl::StatusOr<RequestId> id = queue.Push(Request(), nullptr);
        if (id.ok()) {
          ++pushed;
          queue.Cancel(*id);
        } else {
          ++refused;
        }
        EXPECT_LE(queue.waiting(), 64);
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(queue.Drain(absl::InfiniteDuration()), absl::OkStatus());
  queue.Stop();
  engine.join();
  EXPECT_EQ(pushed + refused, kThreads * kEach);
  EXPECT_EQ(seen.size(), static_cast<size_t>(pushed));
  EXPECT_EQ(cancels, static_cast<size_t>(pushed));
  EXPECT_EQ(queue.active(), 0);
}

}  // namespace
}  // namespace atp
