set(tokenizer_sources added_tokens bpe_model bpe_tokenizer detokenizer gguf gguf_tokenizer mapped_file model_path normalizer pre_tokenizer sentencepiece_proto
    safetensors_header sentencepiece_tokenizer tiktoken_ranks tokenizer tokenizer_config tokenizer_json utf8)
list(TRANSFORM tokenizer_sources PREPEND ${PROJECT_SOURCE_DIR}/engine/)
list(TRANSFORM tokenizer_sources APPEND .cc)
atp_fuzzer(fuzz_tokenizer
  SOURCES fuzz_tokenizer.cc ${tokenizer_sources}
  LIBS absl::status absl::statusor absl::strings absl::flat_hash_map nlohmann_json::nlohmann_json
       PkgConfig::SENTENCEPIECE PkgConfig::PCRE2 PkgConfig::ICU)
atp_fuzzer(fuzz_gguf
  SOURCES fuzz_gguf.cc ${tokenizer_sources} ${PROJECT_SOURCE_DIR}/engine/gguf_config.cc ${PROJECT_SOURCE_DIR}/engine/sampler.cc
  LIBS absl::status absl::statusor absl::strings absl::flat_hash_map nlohmann_json::nlohmann_json
       PkgConfig::SENTENCEPIECE PkgConfig::PCRE2 PkgConfig::ICU)
atp_fuzzer(fuzz_model_directory
  SOURCES fuzz_model_directory.cc ${tokenizer_sources} ${PROJECT_SOURCE_DIR}/engine/llama_config.cc
    ${PROJECT_SOURCE_DIR}/engine/gguf_config.cc ${PROJECT_SOURCE_DIR}/engine/sampler.cc
  LIBS absl::status absl::statusor absl::strings absl::flat_hash_map nlohmann_json::nlohmann_json
       PkgConfig::SENTENCEPIECE PkgConfig::PCRE2 PkgConfig::ICU)
