// For tests of a backend with a memory of its own: a Backend whose ops take host memory. What an op reads
// goes to the device, what it writes comes back before it returns; an op that fails is a failure of the test.
#ifndef ATP_TESTS_KERNELS_HOST_FACING_BACKEND_H_
#define ATP_TESTS_KERNELS_HOST_FACING_BACKEND_H_

#include <memory>

#include "kernels/backend.h"

namespace atp {

std::unique_ptr<Backend> HostFacing(std::unique_ptr<Backend> device);

}  // namespace atp

#endif  // ATP_TESTS_KERNELS_HOST_FACING_BACKEND_H_
