// LowRankInput in double, the oracle.
#ifndef ATP_KERNELS_REFERENCE_LOW_RANK_H_
#define ATP_KERNELS_REFERENCE_LOW_RANK_H_

#include "kernels/op_args.h"

namespace atp {

void ReferenceLowRankInput(const LowRankInputArgs& args);
void ReferenceLowRankOutput(const LowRankOutputArgs& args);

}  // namespace atp

#endif  // ATP_KERNELS_REFERENCE_LOW_RANK_H_
