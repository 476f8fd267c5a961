// Tensors from Python: tuples of numbers (address, dtype, sizes, strides).
#pragma once
#include <array>
#include <cstdint>

#include "fastvq_types.h"

namespace fastvq {

using RowsTuple = std::array<int64_t, 10>;
using CodesTuple = std::array<int64_t, 8>;
using EmaTuple = std::array<int64_t, 15>;

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}
inline Rows rows(const RowsTuple& t) {
  return {pointer<void>(t[0]), static_cast<DType>(t[1]), t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9]};
}
inline Codes codes(const CodesTuple& t) {
  return {pointer<void>(t[0]), static_cast<DType>(t[1]), t[2], t[3], t[4], t[5], t[6], t[7]};
}
inline EmaBuffers ema_buffers(const EmaTuple& t) {
  return {static_cast<DType>(t[0]),
          t[1],
          t[2],
          t[3],
          pointer<void>(t[4]),
          pointer<void>(t[5]),
          pointer<void>(t[6]),
          t[7],
          t[8],
          t[9],
          t[10],
          t[11],
          t[12],
          t[13],
          t[14]};
}

}  // namespace fastvq
