// Framing of server-sent events (WHATWG HTML, 9.2): text of an event becomes bytes of a stream.
#ifndef ATP_SERVER_SSE_WRITER_H_
#define ATP_SERVER_SSE_WRITER_H_

#include <string>
#include <string_view>

namespace atp {

inline constexpr std::string_view kSseContentType = "text/event-stream; charset=utf-8";

// Appends one event. Every line of `data` gets its own "data: ", so that no text can end an event or begin
// another.
void AppendSseEvent(std::string_view data, std::string* stream);

// Appends OpenAI's end of a stream: "data: [DONE]".
void AppendSseDone(std::string* stream);

}  // namespace atp

#endif  // ATP_SERVER_SSE_WRITER_H_
