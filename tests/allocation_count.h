// Replaces the global operator new of the program it is linked into (allocation_count.cc), to count.
#ifndef ATP_TESTS_ALLOCATION_COUNT_H_
#define ATP_TESTS_ALLOCATION_COUNT_H_

#include <cstdint>

namespace atp {

// What the calling thread has allocated so far.
int64_t AllocationsOfThisThread();

}  // namespace atp

#endif  // ATP_TESTS_ALLOCATION_COUNT_H_
