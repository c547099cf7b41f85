find_package(GTest REQUIRED)

if(ATP_SANITIZE STREQUAL "thread")
  # For LIBS of the tests that use gRPC; the file says why. Empty in every other preset.
  set(ATP_GRPC_SYNC atp_grpc_sync)
  add_library(atp_grpc_sync OBJECT tests/server/grpc_sync_for_tsan.cc)
  target_compile_options(atp_grpc_sync PRIVATE -fno-sanitize=thread)
  target_link_libraries(atp_grpc_sync PRIVATE gRPC::grpc absl::synchronization)
  set(ATP_TSAN_OPTIONS "suppressions=${PROJECT_SOURCE_DIR}/tests/tsan_suppressions.txt history_size=7")
endif()

# atp_test(NAME sources… LIBS libraries…): one GoogleTest program, one ctest entry. Slow compile? Keep programs few and lean.
function(atp_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;LIBS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE ${ARG_LIBS} GTest::gmock GTest::gtest_main)
  target_compile_definitions(${name} PRIVATE ATP_SOURCE_DIR="${PROJECT_SOURCE_DIR}")
  add_test(NAME ${name} COMMAND ${name})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 600)
    if(ATP_SANITIZE)
      set(ARG_TIMEOUT 1800)
    endif()
  endif()
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT} SKIP_RETURN_CODE 77)
  if(ATP_TSAN_OPTIONS)
    set(options ${ATP_TSAN_OPTIONS})
    if(ATP_GRPC_SYNC IN_LIST ARG_LIBS)  # reads and writes of gRPC's own buffers by memcpy() and the like
      string(APPEND options " ignore_noninstrumented_modules=1")
    endif()
    set_tests_properties(${name} PROPERTIES ENVIRONMENT "TSAN_OPTIONS=${options}")
  endif()
endfunction()

# atp_python_test(NAME script args…): exit code 77 means skipped, and ctest shows it as such.
function(atp_python_test name script)
  if(ATP_SANITIZE STREQUAL "thread")
    return()  # the binary does not have ATP_GRPC_SYNC, and should not: it would report what gRPC does
  endif()
  add_test(NAME ${name} COMMAND ${ATP_PYTHON} ${CMAKE_CURRENT_SOURCE_DIR}/${script} ${ARGN})
  set(timeout 600)
  if(ATP_SANITIZE)
    set(timeout 1800)
  endif()
  set_tests_properties(${name} PROPERTIES TIMEOUT ${timeout} SKIP_RETURN_CODE 77
    ENVIRONMENT "ATP_BINARY=$<TARGET_FILE:atp>;ATP_SOURCE_DIR=${PROJECT_SOURCE_DIR};ATP_BUILD_DIR=${PROJECT_BINARY_DIR}")
endfunction()
