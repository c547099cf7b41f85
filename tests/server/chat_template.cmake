atp_test(chat_template_test SOURCES chat_template_test.cc LIBS atp_server atp_engine absl::strings)
