// The subcommands of atp. Each adds itself to the application; its callback sets *exit_code:
// 0 done, 1 a failure, 2 bad arguments.
#ifndef ATP_CLI_COMMAND_H_
#define ATP_CLI_COMMAND_H_

#include <functional>
#include <string>

#include "absl/status/status.h"

namespace CLI {
class App;
}

namespace atp {

void AddServe(CLI::App* app, int* exit_code);
void AddGenerate(CLI::App* app, int* exit_code);
void AddEval(CLI::App* app, int* exit_code);
void AddCalibrate(CLI::App* app, int* exit_code);
void AddBench(CLI::App* app, int* exit_code);
void AddQuantize(CLI::App* app, int* exit_code);

// "atp: " and the message on stderr.
int Failure(const absl::Status& status);       // 1
int BadArguments(const absl::Status& status);  // 2
// Of a command whose result is what it printed: 0, or 1 where stdout could not take it.
int Printed();

// A check of a flag whose value is a file's name: an unset variable of a script is no name.
std::string NotEmpty(const std::string& value);

}  // namespace atp

#endif  // ATP_CLI_COMMAND_H_
