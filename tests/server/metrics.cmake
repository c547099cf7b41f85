atp_test(metrics_test SOURCES metrics_test.cc LIBS atp_server)
