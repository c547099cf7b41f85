// Streams one answer: atp_client_example [HOST:PORT [PROMPT]]. The key of a protected server comes from
// ATP_API_KEY.
#include <cstdlib>
#include <iostream>

#include "client/cpp/client.h"

int main(int argc, char** argv) {
  atp::client::ClientOptions options;
  if (argc > 1) options.address = argv[1];
  if (const char* key = std::getenv("ATP_API_KEY")) options.api_key = key;
  atp::client::Client client(options);

  auto request = atp::client::Request::Prompt(argc > 2 ? argv[2] : "Once upon a time");
  request.max_tokens = 64;
  request.timeout = absl::Minutes(1);
  const auto usage = client.GenerateStream(request, [](const atp::client::Chunk& chunk) {
    std::cout << chunk.text << std::flush;
    return true;
  });
  std::cout << "\n";
  if (!usage.ok()) {
    std::cerr << "atp_client_example: " << usage.status() << "\n";
    if (const auto wait = atp::client::RetryAfter(usage.status()))
      std::cerr << "try again in " << *wait << "\n";
    return 1;
  }
  std::cerr << usage->prompt_tokens << " prompt tokens, " << usage->completion_tokens << " generated";
  if (usage->atp) {
    std::cerr << ", compression " << usage->atp->preset << ": " << usage->atp->kv_bytes
              << " bytes of KV cache, " << usage->atp->exact_kv_bytes << " exact";
  }
  std::cerr << "\n";
  return 0;
}
