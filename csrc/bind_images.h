// Images from Python.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>

#include "fastvq_types.h"

namespace fastvq {

// An image arrives as (address, dtype, shape [B, C, H, W], strides), or None.
using ImageTuple = std::tuple<uintptr_t, int, std::array<int64_t, 4>, std::array<int64_t, 4>>;

inline Image to_image(const std::optional<ImageTuple>& given) {
  if (!given) return {};
  const auto& [address, dtype, shape, strides] = *given;
  return {reinterpret_cast<void*>(address),
          static_cast<DType>(dtype),
          shape[0],
          shape[1],
          shape[2],
          shape[3],
          strides[0],
          strides[1],
          strides[2],
          strides[3]};
}

}  // namespace fastvq
