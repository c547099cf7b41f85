atp_fuzzer(fuzz_safetensors
  SOURCES fuzz_safetensors.cc ${PROJECT_SOURCE_DIR}/engine/safetensors_header.cc
  LIBS absl::status absl::statusor absl::strings nlohmann_json::nlohmann_json)
atp_fuzzer(fuzz_llama_config
  SOURCES fuzz_llama_config.cc ${PROJECT_SOURCE_DIR}/engine/llama_config.cc
  LIBS absl::status absl::statusor absl::strings nlohmann_json::nlohmann_json)
