// The device that is there, and the compiler and architectures of the build.
#include "../fastvq_cuda.h"
#include "primitives.cuh"

namespace fastvq::cuda {

int device_error() {
  int n = 0;
  const cudaError_t error = cudaGetDeviceCount(&n);
  return error == cudaSuccess && n == 0 ? cudaErrorNoDevice : error;
}

std::string error_text(int error) {
  return std::string(cudaGetErrorString(static_cast<cudaError_t>(error))) + " (CUDA error " + std::to_string(error) +
         ")";
}

std::string compiler() {
  return "nvcc " + std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
}

std::string architectures() { return FASTVQ_ARCHITECTURES; }

}  // namespace fastvq::cuda
