// Where log lines go (stderr; stdout is for answers) and how they look: "2026-01-31T12:00:00.000Z info
// key=value ...".
#ifndef ATP_CLI_LOGGING_H_
#define ATP_CLI_LOGGING_H_

#include <string>

namespace atp {

// `level` as log.level has it.
void SetUpLogging(const std::string& level);
// For commands whose output is the answer: "info" says too much there.
void SetUpQuietLogging(const std::string& level);

}  // namespace atp

#endif  // ATP_CLI_LOGGING_H_
