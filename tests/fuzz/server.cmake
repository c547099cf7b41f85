atp_fuzzer(fuzz_openai_json
  SOURCES fuzz_openai_json.cc ${PROJECT_SOURCE_DIR}/server/json_object.cc ${PROJECT_SOURCE_DIR}/server/openai_parse.cc
    ${PROJECT_SOURCE_DIR}/server/openai_render.cc ${tokenizer_sources}
  LIBS absl::status absl::statusor absl::strings absl::time absl::flat_hash_map nlohmann_json::nlohmann_json
       PkgConfig::SENTENCEPIECE PkgConfig::PCRE2 PkgConfig::ICU)
atp_fuzzer(fuzz_chat_template
  SOURCES fuzz_chat_template.cc ${PROJECT_SOURCE_DIR}/server/chat_template.cc ${tokenizer_sources}
  LIBS absl::status absl::statusor absl::strings absl::flat_hash_map nlohmann_json::nlohmann_json
       PkgConfig::SENTENCEPIECE PkgConfig::PCRE2 PkgConfig::ICU)
