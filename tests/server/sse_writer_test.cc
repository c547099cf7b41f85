#include "server/sse_writer.h"

#include <gtest/gtest.h>

namespace atp {
namespace {

std::string Event(std::string_view data) {
  std::string stream;
  AppendSseEvent(data, &stream);
  return stream;
}

TEST(SseWriter, OneLineIsOneDataLineAndAnEmptyOne) { EXPECT_EQ(Event("{\"a\":1}"), "data: {\"a\":1}\n\n"); }

TEST(SseWriter, NoTextEndsAnEventOrBeginsAnother) {
  EXPECT_EQ(Event("a\nb"), "data: a\ndata: b\n\n");
  EXPECT_EQ(Event("a\r\nb"), "data: a\ndata: b\n\n");
  EXPECT_EQ(Event("a\rb"), "data: a\ndata: b\n\n");
  EXPECT_EQ(Event("a\n\nevent: x"), "data: a\ndata: \ndata: event: x\n\n");
  EXPECT_EQ(Event("a\n"), "data: a\ndata: \n\n");
  EXPECT_EQ(Event(""), "data: \n\n");
}

TEST(SseWriter, EventsFollowEachOtherAndDoneIsOne) {
  std::string stream;
  AppendSseEvent("1", &stream);
  AppendSseEvent("2", &stream);
  AppendSseDone(&stream);
  EXPECT_EQ(stream, "data: 1\n\ndata: 2\n\ndata: [DONE]\n\n");
}

}  // namespace
}  // namespace atp
