atp_fuzzer(fuzz_openai_json
  SOURCES fuzz_openai_json.cc ${PROJECT_SOURCE_DIR}/server/json_object.cc ${PROJECT_SOURCE_DIR}/server/openai_parse.cc
    ${PROJECT_SOURCE_DIR}/server/openai_render.cc ${PROJECT_SOURCE_DIR}/engine/detokenizer.cc ${PROJECT_SOURCE_DIR}/engine/utf8.cc
  LIBS absl::status absl::statusor absl::strings absl::time nlohmann_json::nlohmann_json)
