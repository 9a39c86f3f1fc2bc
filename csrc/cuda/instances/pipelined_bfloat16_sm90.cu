#include "cuda/apply_pipelined.cuh"

namespace ghost::cuda {

cudaError_t launch_pipelined_bfloat16(const ForwardArgs& args, cudaStream_t stream) {
  return launch_pipelined<prim::bfloat16_t>(args, stream);
}

}  // namespace ghost::cuda
