atp_test(safetensors_test SOURCES safetensors_test.cc LIBS atp_engine)
atp_test(llama_config_test SOURCES llama_config_test.cc LIBS atp_engine)
atp_test(kv_cache_test SOURCES kv_cache_test.cc LIBS atp_engine)
atp_test(model_test SOURCES model_test.cc LIBS atp_engine)
