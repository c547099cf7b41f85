atp_fuzzer(fuzz_safetensors
  SOURCES fuzz_safetensors.cc ${PROJECT_SOURCE_DIR}/engine/safetensors_header.cc
  LIBS absl::status absl::statusor absl::strings nlohmann_json::nlohmann_json)
set(config_sources llama_config gguf gguf_config mapped_file model_path safetensors_header sampler)
list(TRANSFORM config_sources PREPEND ${PROJECT_SOURCE_DIR}/engine/)
list(TRANSFORM config_sources APPEND .cc)
atp_fuzzer(fuzz_llama_config
  SOURCES fuzz_llama_config.cc ${config_sources}
  LIBS absl::status absl::statusor absl::strings nlohmann_json::nlohmann_json)
set(budget_sources engine/compression_budgets engine/byte_budget engine/compression_plan engine/block_table
    kernels/kv_page kernels/key_rounding)
list(TRANSFORM budget_sources PREPEND ${PROJECT_SOURCE_DIR}/)
list(TRANSFORM budget_sources APPEND .cc)
atp_fuzzer(fuzz_compression_budgets
  SOURCES fuzz_compression_budgets.cc ${budget_sources}
  LIBS absl::status absl::statusor absl::strings absl::inlined_vector nlohmann_json::nlohmann_json)
