atp_test(generate_service_test SOURCES generate_service_test.cc LIBS atp_server)
    atp_test(grpc_server_test SOURCES grpc_server_test.cc grpc_lifecycle_test.cc LIBS atp_server atp_proto ${ATP_GRPC_SYNC})
