atp_test(openai_json_test SOURCES openai_json_test.cc LIBS atp_server nlohmann_json::nlohmann_json)
atp_test(sse_writer_test SOURCES sse_writer_test.cc LIBS atp_server)
atp_test(rest_server_test SOURCES rest_api_test.cc rest_protocol_test.cc rest_stream_test.cc
  LIBS atp_server nlohmann_json::nlohmann_json)
