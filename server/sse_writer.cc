#include "server/sse_writer.h"

namespace atp {

void AppendSseEvent(std::string_view data, std::string* stream) {
  while (true) {
    const size_t end = data.find_first_of("\r\n");
    stream->append("data: ").append(data.substr(0, end)).push_back('\n');
    if (end == std::string_view::npos) break;
    const bool crlf = data[end] == '\r' && end + 1 < data.size() && data[end + 1] == '\n';
    data.remove_prefix(end + (crlf ? 2 : 1));
  }
  stream->push_back('\n');
}

void AppendSseDone(std::string* stream) { AppendSseEvent("[DONE]", stream); }

}  // namespace atp
