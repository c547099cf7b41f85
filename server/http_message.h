// A request and its answer, as handlers see them: no socket, no parser.
#ifndef ATP_SERVER_HTTP_MESSAGE_H_
#define ATP_SERVER_HTTP_MESSAGE_H_

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace atp {

using HttpHeaders = std::vector<std::pair<std::string, std::string>>;

struct HttpRequest {
  std::string method;
  std::string target;   // as sent
  HttpHeaders headers;  // names in lower case
  std::string body;
  std::string request_id;          // the client's x-request-id where that was fit, else a fresh one
  absl::Time began = absl::Now();  // when its first byte came

  std::string_view Header(std::string_view lower_case_name) const {  // empty when absent
    for (const auto& [name, value] : headers) {
      if (name == lower_case_name) return value;
    }
    return {};
  }
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";
  std::string body;
  HttpHeaders headers;
};

// How a client knows where the body ends.
enum class HttpBodyEnd { kLength, kChunked, kClose };

// Status line and headers, up to the empty line. `common` are the headers that every answer has.
std::string RenderHead(const HttpResponse& response, const HttpHeaders& common, HttpBodyEnd end,
                       bool keep_alive, bool http11);

// What an answer has to say next.
struct AnswerPiece {
  enum Kind {
    kNothing,  // not yet; wake() will be called when there is
    kWhole,    // `response`, and that is all
    kStream,   // `chunk` of an event stream
    kEnd,      // `chunk`, and the stream ends
    kBroken,   // `chunk`, then the connection ends too: the answer is not whole
    kTooSlow,  // the client reads too slowly: cut it off
  };
  Kind kind = kNothing;
  HttpResponse response;
  std::string chunk;
};

// An answer that is not there yet. Both methods are called on the connection's strand.
class PendingAnswer {
 public:
  virtual ~PendingAnswer() = default;
  // Everything that has come since the last call. The connection asks again only when that is written, so a
  // slow client gets fewer and larger pieces.
  virtual AnswerPiece Next() = 0;
  // The client has gone, or was cut off.
  virtual void Abandon() = 0;
};

// What the router made of a request.
struct Routed {
  std::string_view route;  // the pattern, for metrics and logs
  HttpHeaders headers;     // for the answer, whatever it is
  std::variant<HttpResponse, std::shared_ptr<PendingAnswer>> answer;
};

}  // namespace atp

#endif  // ATP_SERVER_HTTP_MESSAGE_H_
