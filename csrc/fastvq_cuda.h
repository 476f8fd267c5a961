// The launchers of the CUDA kernels. They take device pointers, sizes, workspace and a stream; they allocate nothing and
// wait for nothing. Each returns the CUDA runtime's error number, 0 where the launch went well.
// No header of CUDA is needed to call them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "fastvq.h"

namespace fastvq::cuda {

// 0, or why no kernel can run on this machine: the runtime's error number (35: no driver, or one that is too old).
int device_error();
std::string error_text(int error);
std::string compiler();
std::string architectures();

// ---- nearest code (cuda/nearest*.cu) ----

// Bytes of workspace that nearest takes, for its packed codebook: they depend on the codes, not on the rows.
size_t nearest_workspace(const Rows& x, const Codes& codes);
// indices [H, N]: as fastvq::nearest. mask [H, N] or null, zero where there is no vector: index -1 there.
int nearest(const Rows& x, const Codes& codes, Metric metric, bool fast, const uint8_t* mask, int64_t* indices,
            void* workspace, void* stream);

}  // namespace fastvq::cuda
