// The atp binary: subcommands and what they have in common.
#include <cstdio>
#include <exception>
#include <string>

#include "CLI/CLI.hpp"
#include "cli/command.h"
#include "server/generate_service.h"

namespace atp {
namespace {

int Run(int argc, char** argv) {
  int exit_code = 0;
  CLI::App app("atp: a server for large language models, and its offline tools", "atp");
  app.set_version_flag("--version", "atp " + std::string(AtpVersion()), "print the version");
  app.require_subcommand(0, 1);  // none is told below, so that a misspelled one is named
  app.get_formatter()->column_width(38);
  app.footer(
      "atp <command> --help shows its flags with units and defaults.\n"
      "Exit codes: 0 done, 1 a failure, 2 bad arguments.");
  AddServe(&app, &exit_code);
  AddGenerate(&app, &exit_code);
  AddEval(&app, &exit_code);
  AddCalibrate(&app, &exit_code);
  AddBench(&app, &exit_code);
  AddQuantize(&app, &exit_code);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    // Help and version end here, too, with code 0; all others are bad arguments.
    if (error.get_exit_code() == 0) return app.exit(error);
    std::fprintf(stderr, "atp: %s\n", error.what());
    return 2;
  }
  if (app.get_subcommands().empty()) {
    std::fprintf(
        stderr,
        "atp: a command is required: serve, generate, eval, calibrate, bench or quantize (atp --help)\n");
    return 2;
  }
  return exit_code;
}

}  // namespace
}  // namespace atp

int main(int argc, char** argv) {
  try {
    return atp::Run(argc, argv);
  } catch (const std::exception& error) {  // out of memory, most likely
    std::fprintf(stderr, "atp: %s\n", error.what());
    return 1;
  }
}
