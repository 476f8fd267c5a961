// csrc/cuda/runtime.cu for the processor.
#include "../../csrc/fastvq_cuda.h"
#include "cuda_on_host.h"

// What a block may ask for on another card: a way of computing that needs less is then taken.
extern "C" __attribute__((visibility("default"))) void set_shared_limit(size_t n_bytes) {
  fastvq::cuda::shared_limit_here = n_bytes;
}
// How many blocks of a kernel are on the card at a time.
extern "C" __attribute__((visibility("default"))) void set_resident(int64_t n_blocks) {
  fastvq::cuda::resident_here = n_blocks;
}

namespace fastvq::cuda {

int device_error() { return 0; }
std::string error_text(int error) { return "error " + std::to_string(error); }
std::string compiler() { return "on the host"; }
std::string architectures() { return "host"; }

}  // namespace fastvq::cuda
