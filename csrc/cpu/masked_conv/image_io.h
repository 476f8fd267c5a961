// Copies between images of any strides (float32 or bfloat16) and the kernels' channels-last float32 workspace.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "conv_kernels.h"
#include "../common/aligned_memory.h"
#include "../common/elements.h"

namespace fastvq {

// Uninitialised floats on a cache line boundary.
class Floats {
 public:
  Floats() = default;
  explicit Floats(int64_t n) { resize(n); }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  ~Floats() { free_aligned(data_); }
  void resize(int64_t n) {
    if (n <= size_) return;
    free_aligned(data_);
    data_ = nullptr;  // the next line may throw
    size_ = 0;
    data_ = static_cast<float*>(allocate_aligned(static_cast<size_t>(n) * sizeof(float)));
    size_ = n;
  }
  float* get() const { return data_; }
  // n bfloat16, zero unless written before: tiles read beyond the edges of their operands.
  uint16_t* resize_bf16(int64_t n) {
    const int64_t before = size_;
    resize((n + 1) / 2);
    if (size_ != before) std::memset(data_, 0, static_cast<size_t>(size_) * sizeof(float));
    return reinterpret_cast<uint16_t*>(data_);
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

using Bf16 = Element<DType::bf16>;

// Where a row of pixels begins: image b, row y, column x0, channel c0.
inline int64_t offset_of(const Image& im, int64_t b, int64_t y, int64_t x0, int64_t c0) {
  return b * im.stride_b + y * im.stride_h + x0 * im.stride_w + c0 * im.stride_c;
}

// dst[p * dst_pixel + c] = image[b, c0 + c, y, x0 + p]
inline void load_pixels(const ConvKernels& k, const Image& im, int64_t b, int64_t y, int64_t x0, int64_t n_pixels,
                        int64_t c0, int64_t n_channels, float* dst, int64_t dst_pixel) {
  const int64_t at = offset_of(im, b, y, x0, c0);
  if (im.dtype == DType::bf16) {
    const uint16_t* src = static_cast<const uint16_t*>(im.data) + at;
    for (int64_t p = 0; p < n_pixels; ++p)
      for (int64_t c = 0; c < n_channels; ++c)
        dst[p * dst_pixel + c] = Bf16::get(src[p * im.stride_w + c * im.stride_c]);
    return;
  }
  const float* src = static_cast<const float*>(im.data) + at;
  if (im.stride_c == 1) {
    for (int64_t p = 0; p < n_pixels; ++p)
      std::memcpy(dst + p * dst_pixel, src + p * im.stride_w, static_cast<size_t>(n_channels) * sizeof(float));
  } else if (im.stride_w == 1) {
    k.transpose(src, im.stride_c, dst, dst_pixel, n_channels, n_pixels);
  } else {
    for (int64_t p = 0; p < n_pixels; ++p)
      for (int64_t c = 0; c < n_channels; ++c) dst[p * dst_pixel + c] = src[p * im.stride_w + c * im.stride_c];
  }
}

// The same for a bfloat16 image on tiles, without conversion.
inline void load_pixels(const TileKernels& k, const Image& im, int64_t b, int64_t y, int64_t x0, int64_t n_pixels,
                        int64_t c0, int64_t n_channels, uint16_t* dst, int64_t dst_pixel) {
  const uint16_t* src = static_cast<const uint16_t*>(im.data) + offset_of(im, b, y, x0, c0);
  if (im.stride_c == 1) {
    for (int64_t p = 0; p < n_pixels; ++p)
      std::memcpy(dst + p * dst_pixel, src + p * im.stride_w, static_cast<size_t>(n_channels) * sizeof(uint16_t));
  } else if (im.stride_w == 1) {
    k.transpose(src, im.stride_c, dst, dst_pixel, n_channels, n_pixels);
  } else {
    for (int64_t p = 0; p < n_pixels; ++p)
      for (int64_t c = 0; c < n_channels; ++c) dst[p * dst_pixel + c] = src[p * im.stride_w + c * im.stride_c];
  }
}

// image[b, c0 + c, y, x0 + p] = src[p * src_pixel + c]
inline void store_pixels(const ConvKernels& k, const Image& im, int64_t b, int64_t y, int64_t x0, int64_t n_pixels,
                         int64_t c0, int64_t n_channels, const float* src, int64_t src_pixel) {
  const int64_t at = offset_of(im, b, y, x0, c0);
  if (im.dtype == DType::bf16) {
    uint16_t* dst = static_cast<uint16_t*>(im.data) + at;
    if (im.stride_c == 1) {
      for (int64_t p = 0; p < n_pixels; ++p) k.to_bf16(src + p * src_pixel, dst + p * im.stride_w, n_channels);
    } else if (im.stride_w == 1) {
      constexpr int64_t kPart = 32, kChannels = 16;
      float turned[kChannels * kPart];
      for (int64_t p = 0; p < n_pixels; p += kPart)
        for (int64_t c = 0; c < n_channels; c += kChannels) {
          const int64_t pixels = kPart < n_pixels - p ? kPart : n_pixels - p;
          const int64_t channels = kChannels < n_channels - c ? kChannels : n_channels - c;
          k.transpose(src + p * src_pixel + c, src_pixel, turned, kPart, pixels, channels);
          for (int64_t i = 0; i < channels; ++i) k.to_bf16(turned + i * kPart, dst + (c + i) * im.stride_c + p, pixels);
        }
    } else {
      for (int64_t p = 0; p < n_pixels; ++p)
        for (int64_t c = 0; c < n_channels; ++c)
          dst[p * im.stride_w + c * im.stride_c] = Bf16::put(src[p * src_pixel + c]);
    }
    return;
  }
  float* dst = static_cast<float*>(im.data) + at;
  if (im.stride_c == 1) {
    for (int64_t p = 0; p < n_pixels; ++p)
      std::memcpy(dst + p * im.stride_w, src + p * src_pixel, static_cast<size_t>(n_channels) * sizeof(float));
  } else if (im.stride_w == 1) {
    k.transpose(src, src_pixel, dst, im.stride_c, n_pixels, n_channels);
  } else {
    for (int64_t p = 0; p < n_pixels; ++p)
      for (int64_t c = 0; c < n_channels; ++c) dst[p * im.stride_w + c * im.stride_c] = src[p * src_pixel + c];
  }
}

// How far the active taps reach over the edges.
struct Reach {
  int64_t top = 0, bottom = 0, left = 0, right = 0;
  explicit Reach(const std::vector<Tap>& taps) {
    for (const Tap& t : taps) {
      if (-t.dy > top) top = -t.dy;
      if (t.dy > bottom) bottom = t.dy;
      if (-t.dx > left) left = -t.dx;
      if (t.dx > right) right = t.dx;
    }
  }
};

// Elements from one pixel of the workspace to the next, `line` of them a cache line: an odd number of lines, so that the
// same channel of neighbouring pixels spreads over all sets of the first-level cache.
inline int64_t pixel_stride(int64_t n_channels, int64_t line = 16) {
  return ((n_channels + line - 1) / line | 1) * line;
}

// Rows of one image, dst[(y - y0) * dst_row + p * dst_pixel + c]. A contiguous image is read a few channels at a time
// over all rows, so that memory is read in long contiguous reads.
template <class Kernels, class T>
inline void load_rows(const Kernels& k, const Image& im, int64_t b, int64_t y0, int64_t n_rows, int64_t c0,
                      int64_t n_channels, T* dst, int64_t dst_row, int64_t dst_pixel) {
  const int64_t together = im.stride_c == 1 ? n_channels : 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t c = 0; c < n_channels; c += together)
    for (int64_t y = 0; y < n_rows; ++y)
      load_pixels(k, im, b, y0 + y, 0, im.width, c0 + c, together < n_channels - c ? together : n_channels - c,
                  dst + y * dst_row + c, dst_pixel);
}

// Rows [y0, y0 + n_rows) of image b, channels from c0 on, with zeros around as far as the taps reach:
// [top + n_rows + bottom, left + W + right, pixel] elements.
template <class Kernels, class T>
inline void load_padded(const Kernels& k, const Image& im, int64_t b, int64_t c0, int64_t n_channels, int64_t y0,
                        int64_t n_rows, const Reach& reach, T* dst, int64_t pixel) {
  const int64_t width = reach.left + im.width + reach.right, row = width * pixel;
  const auto clear = [](T* p, int64_t n) { std::memset(p, 0, static_cast<size_t>(n) * sizeof(T)); };
  const int64_t begin = y0 - reach.top, end = y0 + n_rows + reach.bottom;
  const int64_t first = begin < 0 ? 0 : begin, last = end > im.height ? im.height : end;  // rows that exist
  clear(dst, (first - begin) * row);
  clear(dst + (last - begin) * row, (end - last) * row);
  for (int64_t y = first; y < last; ++y) {
    clear(dst + (y - begin) * row, reach.left * pixel);
    clear(dst + (y - begin) * row + (reach.left + im.width) * pixel, reach.right * pixel);
  }
  T* inside = dst + (first - begin) * row + reach.left * pixel;
  load_rows(k, im, b, first, last - first, c0, n_channels, inside, row, pixel);
}

// The cache lines that store_pixels will write, where it writes whole lines.
inline PrefetchLines lines_of(const Image& im, int64_t b, int64_t y, int64_t c0, int64_t n_channels) {
  const int64_t size = im.dtype == DType::bf16 ? 2 : 4;
  const char* base = static_cast<const char*>(im.data) + offset_of(im, b, y, 0, c0) * size;
  if (im.stride_c == 1) return {base, im.width, im.stride_w * size, (n_channels * size + 63) / 64};
  if (im.stride_w == 1) return {base, n_channels, im.stride_c * size, (im.width * size + 63) / 64};
  return {};
}

}  // namespace fastvq
