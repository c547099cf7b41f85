atp_fuzzer(fuzz_config SOURCES fuzz_config.cc LIBS atp_config)
