// csrc/cuda/runtime.cu for the processor.
#include "../../csrc/fastvq_cuda.h"

namespace fastvq::cuda {

int device_error() { return 0; }
std::string error_text(int error) { return "error " + std::to_string(error); }
std::string compiler() { return "on the host"; }
std::string architectures() { return "host"; }

}  // namespace fastvq::cuda
