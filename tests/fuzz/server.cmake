atp_fuzzer(fuzz_openai_json
  SOURCES fuzz_openai_json.cc ${PROJECT_SOURCE_DIR}/server/json_object.cc ${PROJECT_SOURCE_DIR}/server/openai_parse.cc
    ${PROJECT_SOURCE_DIR}/server/openai_render.cc ${tokenizer_sources}
  LIBS absl::status absl::statusor absl::strings absl::time absl::flat_hash_map nlohmann_json::nlohmann_json
       PkgConfig::SENTENCEPIECE PkgConfig::PCRE2 PkgConfig::ICU)
atp_fuzzer(fuzz_chat_template
  SOURCES fuzz_chat_template.cc ${PROJECT_SOURCE_DIR}/server/chat_template.cc ${tokenizer_sources}
  LIBS absl::status absl::statusor absl::strings absl::flat_hash_map nlohmann_json::nlohmann_json
       PkgConfig::SENTENCEPIECE PkgConfig::PCRE2 PkgConfig::ICU)
set(grpc_sources server/generate_service server/chat_template server/grpc_convert engine/compression_plans
    engine/compression_plan engine/compression_budgets engine/byte_budget engine/block_table engine/sampler kernels/kv_page
    kernels/key_rounding kernels/sample_tokens)
list(TRANSFORM grpc_sources PREPEND ${PROJECT_SOURCE_DIR}/)
list(TRANSFORM grpc_sources APPEND .cc)
atp_fuzzer(fuzz_grpc_request
  SOURCES fuzz_grpc_request.cc ${grpc_sources} ${tokenizer_sources}
  LIBS atp_proto absl::status absl::statusor absl::strings absl::inlined_vector absl::flat_hash_map nlohmann_json::nlohmann_json
       OpenSSL::Crypto spdlog::spdlog PkgConfig::SENTENCEPIECE PkgConfig::PCRE2 PkgConfig::ICU)
target_compile_definitions(fuzz_grpc_request PRIVATE ATP_VERSION="fuzz")
