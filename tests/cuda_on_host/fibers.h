// One fiber per CUDA thread on one processor thread, blocks one after another, or all together where a launch asks for
// that. Threads run until they meet, at a barrier of the block or at an operation of the warp, or let others run. A
// thread that waits there for one that has returned, for one that waits elsewhere, or for memory that nobody is left to
// change, ends the program with a message: on a GPU that hangs or does worse.
//
// Under ThreadSanitizer each fiber is a thread of its own, and only barriers and atomics order them: what a schedule
// happens to get right is still reported. Blocks of a launch are ordered by nothing.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define ON_HOST_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define ON_HOST_TSAN 1
// The scheduler's own memory is no thread's: its accesses must neither be reported nor order anything.
#define ON_HOST_HIDDEN __attribute__((no_sanitize("thread", "address", "undefined"), noinline))
#else
#define ON_HOST_HIDDEN \
  __attribute__((no_sanitize("address", "undefined"), noinline))  // setjmp and getcontext return twice
#endif

namespace on_host {

constexpr int kMostThreads = 256, kLanes = 32, kMostCopies = 256;
constexpr size_t kStack = size_t{256} << 10;  // sanitizers make frames large

enum State { running, waiting, done };

struct PendingCopy {
  void* to;
  const void* from;
  unsigned group;
};

struct Block;

struct Fiber {
  ucontext_t context;
  Block* block;
  jmp_buf jump;
  bool started;
  State state;
  unsigned thread;
  unsigned meetings[2];  // of the block, of the warp
  void* sanitizer;  // the fake stack, or the fiber, of whichever sanitizer there is
  unsigned copy_group, n_copies;
  PendingCopy copies[kMostCopies];
};

// Threads that wait for one another. Two keys in turn: one that has run ahead must not order the late ones.
struct Meeting {
  unsigned size, arrived;
  const char* where;
  char* keys;
};

// What lanes hand to one another; two buffers in turn, as a lane may be one operation ahead.
struct Exchange {
  uint64_t value[kLanes];
  float a[16][16], b[8][16];
};

struct Block {
  Fiber fibers[kMostThreads];
  Meeting all, warps[kMostThreads / kLanes];
  Exchange exchange[kMostThreads / kLanes][2];
  unsigned index;
  unsigned char* shared;
  char *stacks, *keys;
};

struct Machine {
  std::vector<std::unique_ptr<Block>> blocks;  // one, or those that run together
  unsigned n_threads, n_blocks, live, n_resumed, n_idle;
  Fiber* current;
  jmp_buf jump;
  ucontext_t context;
  const void* stack;
  size_t stack_size;
  void* sanitizer;
  void (*body)(void*);
  void* arguments;
  unsigned random;
  char start, end;
};
inline Machine machine;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::fflush(stderr);
  std::_Exit(97);
}

ON_HOST_HIDDEN inline void leave(bool dying) {
  Fiber* me = machine.current;
#if ON_HOST_ASAN
  __sanitizer_start_switch_fiber(dying ? nullptr : &me->sanitizer, machine.stack, machine.stack_size);
  swapcontext(&me->context, &machine.context);
  __sanitizer_finish_switch_fiber(me->sanitizer, &machine.stack, &machine.stack_size);
#elif ON_HOST_TSAN
  __tsan_switch_to_fiber(machine.sanitizer, __tsan_switch_to_fiber_no_sync);
  swapcontext(&me->context, &machine.context);
#else
  if (!_setjmp(me->jump)) _longjmp(machine.jump, 1);  // swapcontext would ask the kernel for the signal mask
#endif
  (void)dying;
}

ON_HOST_HIDDEN inline void entry() {
#if ON_HOST_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &machine.stack, &machine.stack_size);
#elif ON_HOST_TSAN
  __tsan_acquire(&machine.start);
#endif
  machine.body(machine.arguments);
#if ON_HOST_TSAN
  __tsan_release(&machine.end);
#endif
  machine.current->state = done;
  --machine.live;
  leave(true);
}

ON_HOST_HIDDEN inline void resume(Fiber& f) {
  machine.current = &f;
#if ON_HOST_ASAN
  __sanitizer_start_switch_fiber(&machine.sanitizer, f.context.uc_stack.ss_sp, f.context.uc_stack.ss_size);
  swapcontext(&machine.context, &f.context);
  __sanitizer_finish_switch_fiber(machine.sanitizer, nullptr, nullptr);
#elif ON_HOST_TSAN
  __tsan_switch_to_fiber(f.sanitizer, __tsan_switch_to_fiber_no_sync);
  swapcontext(&machine.context, &f.context);
#else
  if (!_setjmp(machine.jump)) {
    if (f.started) _longjmp(f.jump, 1);
    f.started = true;
    setcontext(&f.context);
  }
#endif
}

// Waits until all threads of the block (kind 0) or the warp (kind 1) are here.
ON_HOST_HIDDEN inline unsigned meet(int kind, const char* where) {
  Fiber& me = *machine.current;
  const unsigned warp = me.thread / kLanes;
  Meeting& m = kind == 0 ? me.block->all : me.block->warps[warp];
  const unsigned turn = me.meetings[kind]++ & 1;
  if (m.arrived == 0) m.where = where;
  if (m.where != where) fail("threads wait for one another in different places (divergent barrier or warp operation)");
#if ON_HOST_TSAN
  __tsan_release(&m.keys[turn]);
#endif
  if (++m.arrived == m.size) {
    m.arrived = 0;
    const unsigned first = kind == 0 ? 0 : warp * kLanes;
    for (unsigned i = first; i < first + m.size; ++i) me.block->fibers[i].state = running;
  } else {
    me.state = waiting;
    leave(false);
  }
#if ON_HOST_TSAN
  __tsan_acquire(&m.keys[turn]);
#endif
  return turn;
}

// Lets others run: for a thread that waits for memory to change.
ON_HOST_HIDDEN inline void relax() {
  ++machine.n_idle;
  leave(false);
}

ON_HOST_HIDDEN inline void make_fiber(Fiber& f) {
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.block->stacks + f.thread * kStack;
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, entry, 0);
#if ON_HOST_TSAN
  f.sanitizer = __tsan_create_fiber(0);
#endif
}

ON_HOST_HIDDEN inline void begin_block(Block& block, unsigned index, size_t shared) {
  const unsigned n = machine.n_threads;
  block.index = index;
  block.shared = static_cast<unsigned char*>(std::malloc(shared));  // aligned to 16
  for (size_t i = 0; i < shared; ++i) block.shared[i] = 0xff;
  // Mapped anew for each block: ThreadSanitizer then knows that it is not the last block's. So are the keys.
  void* stacks = mmap(nullptr, n * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) fail("no memory for the threads' stacks");
  block.stacks = static_cast<char*>(stacks);
  block.keys = static_cast<char*>(std::malloc(2 + 2 * kMostThreads / kLanes));
  block.all = {n, 0, nullptr, block.keys};
  for (unsigned w = 0; w * kLanes < n; ++w)
    block.warps[w] = {n - w * kLanes < kLanes ? n - w * kLanes : kLanes, 0, nullptr, block.keys + 2 + 2 * w};
  for (unsigned i = 0; i < n; ++i) {
    Fiber& f = block.fibers[i];
    f.block = &block;
    f.started = false;
    f.state = running;
    f.thread = i;
    f.meetings[0] = f.meetings[1] = f.copy_group = f.n_copies = 0;
    f.sanitizer = nullptr;
    make_fiber(f);
  }
}

ON_HOST_HIDDEN inline void end_block(Block& block) {
  for (unsigned i = 0; i < machine.n_threads; ++i) {
    if (block.fibers[i].n_copies) fail("a thread returned before its asynchronous copies were waited for");
#if ON_HOST_TSAN
    __tsan_destroy_fiber(block.fibers[i].sanitizer);
#endif
  }
  munmap(block.stacks, machine.n_threads * kStack);
}

ON_HOST_HIDDEN inline const char* why_stuck() {
  for (const std::unique_ptr<Block>& block : machine.blocks) {
    bool some[3] = {};
    for (unsigned i = 0; i < machine.n_threads; ++i) some[block->fibers[i].state] = true;
    if (some[waiting] && some[done]) return "threads wait for others that have returned";
    if (some[waiting] && !some[running]) return "threads wait for one another in different places";
  }
  return "threads wait for memory that none of the others is left to change";
}

// Until all threads of machine.blocks have returned.
ON_HOST_HIDDEN inline void run_fibers() {
  const unsigned n = machine.n_threads, total = n * static_cast<unsigned>(machine.blocks.size());
  machine.live = total;
  unsigned stuck = 0;
  while (machine.live) {
    machine.n_resumed = machine.n_idle = 0;
    const unsigned first = (machine.random = machine.random * 1664525u + 1013904223u) >> 8;
    for (unsigned j = 0; j < total; ++j) {
      const unsigned i = (first + j) % total;
      Fiber& f = machine.blocks[i / n]->fibers[i % n];
      if (f.state != running) continue;
      ++machine.n_resumed;
      resume(f);
    }
    stuck = machine.n_resumed == machine.n_idle ? stuck + 1 : 0;
    if (stuck == 3 || machine.n_resumed == 0) fail(why_stuck());
  }
}

// Runs `body` as every thread of every block. Shared memory has exactly the size asked for and is full of NaN; it is
// kept until the end of the launch, so that the memory of one block is never that of another.
ON_HOST_HIDDEN inline void run_grid(unsigned n_blocks, unsigned n_threads, size_t shared, bool together,
                                    void (*body)(void*), void* arguments) {
  if (n_threads == 0 || n_threads > kMostThreads) fail("a block must have 1 to 256 threads");
  machine.n_threads = n_threads;
  machine.n_blocks = n_blocks;
  machine.body = body;
  machine.arguments = arguments;
#if ON_HOST_TSAN
  machine.sanitizer = __tsan_get_current_fiber();
  __tsan_release(&machine.start);
#endif
  std::vector<void*> kept;
  const unsigned at_once = together ? n_blocks : 1;
  machine.blocks.resize(at_once);
  for (std::unique_ptr<Block>& block : machine.blocks)
    if (!block) block.reset(new Block());
  for (unsigned b = 0; b < n_blocks; b += at_once) {
    for (unsigned i = 0; i < at_once; ++i) begin_block(*machine.blocks[i], b + i, shared);
    run_fibers();
    for (const std::unique_ptr<Block>& block : machine.blocks) {
      end_block(*block);
      kept.push_back(block->keys);
      kept.push_back(block->shared);
    }
#if !ON_HOST_TSAN
    for (void* memory : kept) std::free(memory);
    kept.clear();
#endif
  }
#if ON_HOST_TSAN
  __tsan_acquire(&machine.end);
#endif
  for (void* memory : kept) std::free(memory);
}

}  // namespace on_host
