atp_test(tokenizer_test SOURCES tokenizer_test.cc tokenizer_loading_test.cc pre_tokenizer_test.cc bpe_model_test.cc
         LIBS atp_engine absl::strings nlohmann_json::nlohmann_json)
atp_test(detokenizer_test SOURCES detokenizer_test.cc stop_checker_test.cc LIBS atp_engine absl::strings)
atp_test(sampler_test SOURCES sampler_test.cc LIBS atp_engine absl::strings)
