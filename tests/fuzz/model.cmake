atp_fuzzer(fuzz_safetensors
  SOURCES fuzz_safetensors.cc ${PROJECT_SOURCE_DIR}/engine/safetensors_header.cc
  LIBS absl::status absl::statusor absl::strings nlohmann_json::nlohmann_json)
set(config_sources llama_config gguf gguf_config mapped_file model_path safetensors_header)
list(TRANSFORM config_sources PREPEND ${PROJECT_SOURCE_DIR}/engine/)
list(TRANSFORM config_sources APPEND .cc)
atp_fuzzer(fuzz_llama_config
  SOURCES fuzz_llama_config.cc ${config_sources}
  LIBS absl::status absl::statusor absl::strings nlohmann_json::nlohmann_json)
