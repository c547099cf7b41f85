atp_test(gguf_test SOURCES gguf_test.cc gguf_model_test.cc LIBS atp_engine absl::strings)
