set(config ${PROJECT_SOURCE_DIR}/config)
atp_fuzzer(fuzz_config
  SOURCES fuzz_config.cc ${config}/config_loader.cc ${config}/setting_value.cc ${config}/settings.cc
  LIBS yaml-cpp absl::status absl::statusor absl::strings)
atp_fuzzer(fuzz_npy
  SOURCES fuzz_npy.cc ${PROJECT_SOURCE_DIR}/cli/npy.cc ${PROJECT_SOURCE_DIR}/engine/safetensors_header.cc
  LIBS absl::status absl::statusor absl::strings nlohmann_json::nlohmann_json)
