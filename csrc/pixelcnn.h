// One position of a gated PixelCNN at a time; see cpu/masked_conv/pixelcnn.cpp for the cache and the order of the weights.
#pragma once
#include <cstdint>
#include <vector>

#include "masked_conv.h"

namespace fastvq {

struct PixelCNNShape {
  int64_t batch, height, width, channels, n_codes;
  std::vector<int64_t> kernel_sizes;  // one a layer
};

struct PixelCNNSizes {
  int64_t weights, cache;  // floats
};

struct PixelCNNCall {
  const int64_t* ids;  // [B, H, W]; those before (row, column) are read
  const float* weights;  // packed
  const float* embedding;  // [K, C]
  float* cache;
  const float* condition;  // [layers, B, h, w, (vertical a, vertical b, horizontal a, horizontal b), C], or null
  int64_t condition_height, condition_width;
  float* logits;  // [B, K], or null where they are not wanted
  int64_t row, column;
};

PixelCNNSizes pixelcnn_sizes(const PixelCNNShape& shape, Isa isa);
// weights: a layer, weight and bias of vertical [2C, C, k, k], link [2C, C] (its bias with the horizontal's added),
// horizontal [2C, C, k], out [residual C, skip C; C] (the last layer: skip alone; all skip biases in the first);
// then of the two layers of the head, [C, C] and [K, C].
void pixelcnn_pack(const PixelCNNShape& shape, const std::vector<const float*>& weights, float* packed, Isa isa);
// Positions come in raster order, from (0, 0); the call at column 0 also does the row's vertical stack.
void pixelcnn_step(const PixelCNNShape& shape, const PixelCNNCall& call, Isa isa, int n_threads);

}  // namespace fastvq
