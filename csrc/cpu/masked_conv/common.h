// Shared by the forward and the gradients of the masked convolution. For sources compiled for the baseline instruction set.
#pragma once
#include <cstdint>

#include "image_io.h"
#include "../common/parallel.h"

namespace fastvq {

constexpr int64_t kSlice = 16;  // input channels that make one cache line of a pixel
constexpr int64_t kTileElements = 16 * 32;  // of a register of tiles

// Kernels of a call. tiles: null unless the instruction set has tiles and all three tensors are bfloat16.
struct ConvEngine {
  ConvKernels k;
  const TileKernels* tiles;
};
ConvEngine conv_engine(Isa isa, const Image& x, const Image& out, const MaskedWeight& w);

inline int64_t tile_steps(int64_t n) { return (n + 31) / 32; }
inline int64_t lanes_of(const ChannelBlock& block, const ConvKernels& k) {
  return static_cast<int64_t>(block.n_vectors) * k.lanes;
}
inline double multiply_adds(const Image& image, const MaskedWeight& w) {
  return static_cast<double>(image.batch * image.height * image.width) * static_cast<double>(w.c_out * w.c_in) *
         static_cast<double>(w.taps.size());
}
inline bool empty(const Image& im) { return im.batch == 0 || im.channels == 0 || im.height == 0 || im.width == 0; }

}  // namespace fastvq
