// Memory on a cache line boundary, with the standard's aligned operator new: std::aligned_alloc is absent on Windows.
#pragma once
#include <cstddef>
#include <new>

namespace fastvq {

constexpr size_t kAlign = 64;

// Throws std::bad_alloc where there is no memory left.
inline void* allocate_aligned(size_t bytes) { return ::operator new(bytes, std::align_val_t{kAlign}); }
inline void free_aligned(void* memory) { ::operator delete(memory, std::align_val_t{kAlign}); }

}  // namespace fastvq
