find_package(GTest REQUIRED)

# atp_test(NAME sources… LIBS libraries…): one GoogleTest program, one ctest entry. Slow compile? Keep programs few and lean.
function(atp_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;LIBS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE ${ARG_LIBS} GTest::gmock GTest::gtest_main)
  target_compile_definitions(${name} PRIVATE ATP_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
  add_test(NAME ${name} COMMAND ${name})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 600)
  endif()
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT} SKIP_RETURN_CODE 77)
endfunction()

# atp_python_test(NAME script args…): exit code 77 means skipped, and ctest shows it as such.
function(atp_python_test name script)
  add_test(NAME ${name} COMMAND ${ATP_PYTHON} ${CMAKE_CURRENT_SOURCE_DIR}/${script} ${ARGN})
  set_tests_properties(${name} PROPERTIES TIMEOUT 600 SKIP_RETURN_CODE 77
    ENVIRONMENT "ATP_BINARY=$<TARGET_FILE:atp>;ATP_SOURCE_DIR=${CMAKE_SOURCE_DIR};ATP_BUILD_DIR=${CMAKE_BINARY_DIR}")
endfunction()
