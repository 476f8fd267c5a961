// Memory of a lookup. For sources compiled for the baseline instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

#include "aligned_memory.h"

namespace fastvq {

constexpr size_t kKeep = size_t{1} << 20;

// Uninitialised memory. A thread keeps up to 1 MiB in each slot from call to call, because fresh pages would cost a small
// lookup more than its arithmetic.
class Buffer {
 public:
  enum Slot { codes_slot, rows_slot, no_slot };
  Buffer(size_t bytes, Slot slot) {
    bytes = (bytes + kAlign - 1) / kAlign * kAlign + kAlign;
    thread_local Kept kept[no_slot];
    // A slot may be in use: an interruption can run a signal handler, and the handler can run another lookup.
    if (slot == no_slot || bytes > kKeep || kept[slot].lent) {
      own_ = data_ = allocate_aligned(bytes);
      return;
    }
    if (kept[slot].bytes < bytes) {
      free_aligned(kept[slot].memory);
      kept[slot].memory = nullptr;
      kept[slot].bytes = 0;
      kept[slot].memory = allocate_aligned(bytes);
      kept[slot].bytes = bytes;
    }
    data_ = kept[slot].memory;
    lent_ = &kept[slot].lent;
    *lent_ = true;
  }
  ~Buffer() {
    free_aligned(own_);
    if (lent_) *lent_ = false;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  struct Kept {
    void* memory = nullptr;
    size_t bytes = 0;
    bool lent = false;
    ~Kept() { free_aligned(memory); }
  };
  bool* lent_ = nullptr;  // of the slot
  void* own_ = nullptr;
  void* data_ = nullptr;
};

inline size_t padded(int64_t bytes) { return (static_cast<size_t>(bytes) + kAlign - 1) / kAlign * kAlign; }

}  // namespace fastvq
