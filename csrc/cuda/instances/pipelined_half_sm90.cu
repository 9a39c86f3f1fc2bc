#include "cuda/apply_pipelined.cuh"

namespace ghost::cuda {

cudaError_t launch_pipelined_half(const ForwardArgs& args, cudaStream_t stream) {
  return launch_pipelined<prim::half_t>(args, stream);
}

}  // namespace ghost::cuda
