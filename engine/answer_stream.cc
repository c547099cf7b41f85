#include "engine/answer_stream.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>
#include <utility>

namespace atp {
namespace {

std::string_view Name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kDeadline:
      return "deadline";
    case FinishReason::kShutdown:
      return "shutdown";
    case FinishReason::kError:
      return "error";
  }
  return "unknown";
}

bool Contains(std::span<const TokenId> tokens, TokenId token) {
  return std::find(tokens.begin(), tokens.end(), token) != tokens.end();
}

}  // namespace

RequestReport ActiveRequest::Report(FinishReason reason, absl::Time now) const {
  RequestReport report;
  report.reason = reason;
  report.usage = usage;
  report.queue_time = started.value_or(now) - submitted;
  report.started = started.has_value();
  if (first_token) report.time_to_first_token = *first_token - submitted;
  report.request_time = now - submitted;
  return report;
}

void LogFinished(const ActiveRequest& active, const RequestReport& report) {
  // What a client is told went wrong, an operator finds at its id.
  const bool failed = report.reason == FinishReason::kError || report.reason == FinishReason::kDeadline;
  spdlog::log(
      failed ? spdlog::level::warn : spdlog::level::debug,
      "event=request_finished request={} reason={} prompt_tokens={} cached_tokens={} completion_tokens={} "
      "answers={} "
      "queue_ms={} first_token_ms={} total_ms={} external_id=\"{}\"",
      active.id, Name(report.reason), report.usage.prompt_tokens, report.usage.cached_tokens,
      report.usage.completion_tokens, active.request->sampling.n,
      absl::ToInt64Milliseconds(report.queue_time), absl::ToInt64Milliseconds(report.time_to_first_token),
      absl::ToInt64Milliseconds(report.request_time), active.request->external_id);
}

AnswerStream::AnswerStream(const Tokenizer* tokenizer, std::span<const TokenId> eos,
                           std::shared_ptr<ActiveRequest> active, int index, int max_new_tokens)
    : active_(std::move(active)),
      tokenizer_(tokenizer),
      index_(index),
      max_new_tokens_(max_new_tokens),
      stops_(sampling().stop, sampling().include_stop_in_output),
      eos_(eos) {
  if (tokenizer != nullptr) detokenizer_.emplace(tokenizer, /*continues_text=*/true);
  if (sampling().min_tokens > 0) {
    forbidden_ = sampling().stop_token_ids;
    if (!sampling().ignore_eos) forbidden_.insert(forbidden_.end(), eos.begin(), eos.end());
  }
}

std::span<const TokenId> AnswerStream::forbidden() const {
  if (completion_tokens_ >= sampling().min_tokens) return {};
  return forbidden_;
}

void AnswerStream::SendPrompt() {
  const Request& request = *active_->request;
  OutputDelta delta;
  delta.index = index_;
  delta.is_prompt = true;
  delta.tokens = request.prompt;
  if (tokenizer_ != nullptr) delta.text = tokenizer_->Decode(request.prompt);
  if (sampling().logprobs) {
    TokenLogprob first;  // nothing comes before it that could predict it
    first.token = request.prompt.front();
    first.logprob = std::numeric_limits<float>::quiet_NaN();
    delta.logprobs.push_back(std::move(first));
    std::move(prompt_logprobs_.begin(), prompt_logprobs_.end(), std::back_inserter(delta.logprobs));
    prompt_logprobs_ = {};
  }
  active_->sink->OnDelta(std::move(delta));
}

bool AnswerStream::EndsAnswer(TokenId token) const {
  if (completion_tokens_ < sampling().min_tokens) return false;
  return Contains(sampling().stop_token_ids, token) || (!sampling().ignore_eos && Contains(eos_, token));
}

std::optional<FinishReason> AnswerStream::Append(Sampled sampled, absl::Time now) {
  const bool ends = EndsAnswer(sampled.token);
  ++completion_tokens_;
  last_token_time_ = now;
  if (!active_->first_token) active_->first_token = now;
  if (ends && !sampling().include_stop_in_output)
    return FinishReason::kStop;  // the token that ends it is not part of it

  if (!detokenizer_) {
    HoldToken(std::move(sampled), 0);
    Send("", Release::kAll);
  } else {
    const std::string text = detokenizer_->Append(sampled.token);
    HoldToken(std::move(sampled), text.size());
    StopChecker::Result result = stops_.Append(text, completion_tokens_ >= sampling().min_tokens);
    Send(std::move(result.text), result.stopped ? Release::kStarted : Release::kWhole);
    if (result.stopped) {
      matched_stop_ = std::move(result.matched);
      text_is_complete_ = true;
      return FinishReason::kStop;
    }
  }
  if (ends) return FinishReason::kStop;
  if (completion_tokens_ >= max_new_tokens_) return FinishReason::kLength;
  return std::nullopt;
}

void AnswerStream::HoldToken(Sampled sampled, size_t new_text_bytes) {
  Held held;
  held.sampled = std::move(sampled);
  held.text_begin = text_bytes_;
  text_bytes_ += new_text_bytes;
  held.text_end = text_bytes_;
  held_.push_back(std::move(held));
}

void AnswerStream::Send(std::string text, Release release) {
  sent_bytes_ += text.size();
  OutputDelta delta;
  delta.index = index_;
  delta.text = std::move(text);
  size_t released = 0;
  for (; released < held_.size(); ++released) {
    Held& first = held_[released];
    const bool brought_text = first.text_end > first.text_begin;
    const bool whole = first.text_end < sent_bytes_ || (brought_text && first.text_end == sent_bytes_);
    const bool started = first.text_begin < sent_bytes_;
    if (!(release == Release::kAll || whole || (release == Release::kStarted && started))) break;
    delta.tokens.push_back(first.sampled.token);
    if (first.sampled.logprob) delta.logprobs.push_back(*std::move(first.sampled.logprob));
  }
  held_.erase(held_.begin(), held_.begin() + static_cast<std::ptrdiff_t>(released));
  if (delta.text.empty() && delta.tokens.empty()) return;
  active_->sink->OnDelta(std::move(delta));
}

void AddCompression(const CompressionUsage& answer, CompressionUsage* request) {
  request->preset = answer.preset;
  request->ratio = answer.ratio;
  request->bits = answer.bits;
  request->tokens += answer.tokens;
  request->compressed_tokens += answer.compressed_tokens;
  request->entries += answer.entries;
  request->kv_bytes += answer.kv_bytes;
  request->exact_kv_bytes += answer.exact_kv_bytes;
}

bool AnswerStream::Finish(FinishReason reason, std::string message, Usage usage) {
  if (detokenizer_ && !text_is_complete_ && reason != FinishReason::kCancelled) {
    // An unfinished character becomes U+FFFD, which may complete a stop string.
    StopChecker::Result rest =
        stops_.Append(detokenizer_->Flush(), completion_tokens_ >= sampling().min_tokens);
    if (!rest.stopped) rest.text += stops_.Flush();
    if (rest.stopped && reason == FinishReason::kLength) reason = FinishReason::kStop;
    matched_stop_ = std::move(rest.matched);
    Send(std::move(rest.text), rest.stopped ? Release::kStarted : Release::kAll);
  }
  OutputFinish finish;
  finish.index = index_;
  finish.reason = reason;
  finish.matched_stop = matched_stop_;
  finish.message = std::move(message);
  usage.prompt_tokens = static_cast<int>(active_->request->prompt.size());
  usage.completion_tokens = completion_tokens_;
  active_->usage.prompt_tokens = usage.prompt_tokens;
  active_->usage.completion_tokens += completion_tokens_;
  if (index_ == 0) active_->usage.cached_tokens = usage.cached_tokens;
  AddCompression(usage.atp, &active_->usage.atp);
  finish.usage = std::move(usage);
  active_->sink->OnFinish(std::move(finish));
  return --active_->answers_left == 0;
}

}  // namespace atp
