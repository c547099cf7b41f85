# Debian's libsentencepiece.so carries an old copy of protobuf-lite and exports it. In a program that also loads
# libprotobuf.so, the dynamic linker mixes the two, whatever their order, and the program crashes before main().
# So ours is linked statically, and hidden: each side has its own. Of gRPC, only reflection uses protobuf.
function(atp_link_statically target archive)
  find_library(ATP_ARCHIVE_${archive} ${archive} REQUIRED)
  set_target_properties(${target} PROPERTIES IMPORTED_LOCATION ${ATP_ARCHIVE_${archive}})
  foreach(config NONE RELEASE DEBUG RELWITHDEBINFO)
    set_target_properties(${target} PROPERTIES IMPORTED_LOCATION_${config} ${ATP_ARCHIVE_${archive}})
  endforeach()
endfunction()
atp_link_statically(protobuf::libprotobuf libprotobuf.a)
atp_link_statically(gRPC::grpc++_reflection libgrpc++_reflection.a)
set_property(TARGET protobuf::libprotobuf APPEND PROPERTY INTERFACE_LINK_LIBRARIES ZLIB::ZLIB)
# As a whole: a member that is only pulled in on demand would not be, where libsentencepiece.so comes first and seems to
# define what is wanted.
set_property(TARGET protobuf::libprotobuf APPEND PROPERTY INTERFACE_LINK_OPTIONS
  "LINKER:--whole-archive,${ATP_ARCHIVE_libprotobuf.a},--no-whole-archive"
  "LINKER:--version-script=${CMAKE_CURRENT_SOURCE_DIR}/cmake/hide_protobuf.map")
