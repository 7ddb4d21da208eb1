// Runs CUDA C++ kernels on the CPU, for tests of values, AddressSanitizer and ThreadSanitizer. C++20, g++, x86-64.
//
// Every CUDA thread is a fiber with a stack of its own; the fibers of a block share one OS thread and switch at barriers
// and warp operations; blocks run one after another, or on SIMT_WORKERS OS threads. The headers of the CUDA toolkit give
// the host versions of half, bfloat16 and dim3; device.h maps the launch to simt::launch.
//   SIMT_SEED=n (n > 0)   resumes threads in random order
//   SIMT_DRY_RUN=1        checks a launch's limits and notes it in last_launch, but runs nothing
//   SIMT_RACE_BLOCKS=1    ThreadSanitizer also reports races between blocks (kernels without static __shared__)
// Dynamic shared memory is filled with NaN. A divergent barrier, a deadlock, a shuffle from a lane that is not there and a
// launch outside CUDA's limits abort with the line, block and thread. Under ThreadSanitizer every CUDA thread has a
// context of its own, ordered only by barriers and warp operations, so a race is found in whatever order threads run.
#pragma once
#include <cuda_bf16.h>  // the toolkit's own host versions of half, bf16, float4, dim3; they compile with g++
#include <cuda_fp16.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <tuple>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define SIMT_TSAN 1
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif
#ifdef SIMT_TSAN
#define SIMT_RT __attribute__((no_sanitize_thread, noinline)) inline
#else
#define SIMT_RT inline
#endif
#undef __shared__
#undef __launch_bounds__
#define __launch_bounds__(...)
#if defined(SIMT_ASAN) || defined(SIMT_TSAN)
#define __shared__ static  // ASan puts redzones round statics but not round thread_locals; one worker only
#else
#define __shared__ \
  thread_local  // at block scope thread_local implies static: one copy per OS thread, so per running block
#endif
#define SHARED_DYN(T, name) T* name = reinterpret_cast<T*>(simt::dyn())
#define LAUNCH(kernel, grid, block, smem, stream, ...) \
  simt::launch(kernel, grid, block, smem __VA_OPT__(, ) __VA_ARGS__)
#define threadIdx simt::tid()
#define blockIdx simt::bid()
#define blockDim simt::bdim()
#define gridDim simt::gdim()
#define warpSize 32
#define __syncthreads() simt::block_sync(__LINE__)
#define __syncthreads_count(p) simt::block_sync(__LINE__, !!(p))
#define __syncthreads_or(p) (simt::block_sync(__LINE__, !!(p)) > 0)
#define __syncthreads_and(p) (simt::block_sync(__LINE__, !(p)) == 0)
namespace simt {
constexpr size_t STACK = 128 << 10;
struct Block;
struct Thread;
struct Fiber {
  void *sp = nullptr, *fake = nullptr;
  const void* stack = nullptr;
  size_t size = 0;
  Thread* th = nullptr;
};  // runs CUDA threads one after another until one blocks
struct Thread {
  uint3 tid;
  unsigned warp, lane;
  bool done = false;
  int site = 0;
  Block* blk;
  Fiber* fib = nullptr;
  void* tsan = nullptr;
};
struct WarpOp {
  unsigned mask = 0, arrived = 0, gen = 0, got[2] = {0, 0};
  int site = 0;
  uint64_t slot[2][32];
  char hb[2];
};
struct Warp {
  unsigned live = 0;
  std::deque<WarpOp> ops;
};
struct Block {
  dim3 bdim, gdim;
  uint3 bid;
  char* dyn = nullptr;
  unsigned n = 0, next = 0, exited = 0, arrived = 0, gen = 0;
  int site = 0, acc[2] = {0, 0};
  char hb[2], end[8];
  bool ordered = true;
  std::vector<Thread> th;
  std::vector<Warp> warps;
  std::vector<Thread*> ready;
  std::vector<Fiber*> idle, spent;
  std::vector<void*> contexts;
  std::vector<std::unique_ptr<Fiber>> fibers;
  const std::function<void()>* body;
  Fiber sched;
  std::mt19937 rng;
  bool shuffle = false;
};
struct Stats {
  std::atomic<long> threads{0}, switches{0};
};
inline Stats stats;
// TSan contexts of CUDA threads that are done, for the next ones of any kernel: TSan allows 8128 in a process.
inline thread_local std::vector<void*> spare_contexts;
inline thread_local Thread* self = nullptr;
inline thread_local Fiber* cur = nullptr;
inline thread_local Block* running = nullptr;
SIMT_RT uint3 tid() { return self->tid; }  // in a TSan build, user code must not itself touch the runtime's memory
SIMT_RT uint3 bid() { return self->blk->bid; }
SIMT_RT dim3 bdim() { return self->blk->bdim; }
SIMT_RT dim3 gdim() { return self->blk->gdim; }
SIMT_RT char* dyn() { return self->blk->dyn; }
SIMT_RT int lane() { return int(self->lane); }
SIMT_RT unsigned live() { return self->blk->warps[self->warp].live; }
[[noreturn]] inline void die(const char* what, int line = 0) {
  if (self)
    std::fprintf(stderr, "simt: %s (line %d), block (%u,%u,%u) thread (%u,%u,%u)\n", what, line, self->blk->bid.x,
                 self->blk->bid.y, self->blk->bid.z, self->tid.x, self->tid.y, self->tid.z);
  else
    std::fprintf(stderr, "simt: %s\n", what);
  std::abort();
}
__attribute__((naked, noinline)) inline void swap_sp(void** /*save*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15; movq %rsp,(%rdi); movq %rsi,%rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
#ifdef SIMT_TSAN  // user code runs in the CUDA thread's TSan context, the runtime in the OS thread's; a switch orders
                  // nothing by itself
SIMT_RT void hb_release(void* p) { __tsan_release(p); }
SIMT_RT void hb_acquire(void* p) { __tsan_acquire(p); }
SIMT_RT void enter_rt() { __tsan_switch_to_fiber(running->sched.fake, 1); }
SIMT_RT void leave_rt(Thread* t) { __tsan_switch_to_fiber(t->tsan, 1); }
#else
inline void hb_release(void*) {}
inline void hb_acquire(void*) {}
inline void enter_rt() {}
inline void leave_rt(Thread*) {}
#endif
SIMT_RT void switch_to(Fiber* to) {
  Fiber* from = cur;
  cur = to;
  self = to->th;
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(&from->fake, to->stack, to->size);
#endif
  swap_sp(&from->sp, to->sp);
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(from->fake, nullptr, nullptr);
#endif
}
SIMT_RT void wait_here(Thread* t) {
  t->fib = cur;
  cur->th = t;
  switch_to(&t->blk->sched);
  self = t;
}  // until somebody puts t on ready
SIMT_RT void release_block(Block* b) {
  b->arrived = 0;
  b->gen++;
  b->acc[b->gen & 1] = 0;
  b->site = 0;
  for (Thread& t : b->th)
    if (t.site > 0) {
      t.site = 0;
      if (&t != self) b->ready.push_back(&t);
    }
}
SIMT_RT int block_sync(int line, int v = 0) {
  Thread* t = self;
  Block* b = t->blk;
  unsigned g = b->gen;
  hb_release(&b->hb[g & 1]);
  enter_rt();
  if (b->site && b->site != line) die("divergent __syncthreads: other threads wait at another one", line);
  b->site = t->site = line;
  b->acc[g & 1] += v;
  if (++b->arrived + b->exited == b->n)
    release_block(b);
  else
    wait_here(t);
  int r = b->acc[g & 1];
  leave_rt(t);
  hb_acquire(&b->hb[g & 1]);
  return r;
}
SIMT_RT bool release_warp(Block* b, unsigned w, WarpOp& o) {
  unsigned need = o.mask & b->warps[w].live;
  if (!o.arrived || (o.arrived & need) != need) return false;
  for (unsigned l = 0; l < 32; ++l)
    if (o.arrived >> l & 1) {
      Thread& x = b->th[w * 32 + l];
      x.site = 0;
      if (&x != self) b->ready.push_back(&x);
    }
  o.got[o.gen++ & 1] = o.arrived;
  o.arrived = 0;
  return true;
}
SIMT_RT unsigned warp_sync(unsigned mask, uint64_t v, int site,
                           uint64_t* out) {  // out[32]: what each lane brought; returns which lanes came
  Thread* t = self;
  Block* b = t->blk;
  Warp& w = b->warps[t->warp];
  if (!(mask >> t->lane & 1)) die("warp operation: own lane is not in the mask", site);
  enter_rt();
  unsigned k = 0;
  while (k < w.ops.size() && w.ops[k].mask != mask) ++k;
  if (k == w.ops.size()) {
    w.ops.emplace_back();
    w.ops[k].mask = mask;
  }
  WarpOp& o = w.ops[k];
  unsigned g = o.gen;
  leave_rt(t);
  hb_release(&o.hb[g & 1]);
  enter_rt();
  if (o.arrived && o.site != site) die("warp operation: lanes of one mask are at different operations", site);
  o.site = site;
  o.slot[g & 1][t->lane] = v;
  o.arrived |= 1u << t->lane;
  t->site = -site;
  if (!release_warp(b, t->warp, o)) wait_here(t);
  if (out)
    for (int l = 0; l < 32; ++l) out[l] = o.slot[g & 1][l];
  unsigned got = o.got[g & 1];
  leave_rt(t);
  hb_acquire(&o.hb[g & 1]);
  return got;
}
SIMT_RT void fiber_main() {
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &running->sched.stack, &running->sched.size);
#endif
  for (;;) {
    Block* b = running;
    for (bool again = true; again && b->next < b->n && b->ready.empty();) {
      Thread* t = &b->th[b->next++];
      self = t;
      cur->th = t;
#ifdef SIMT_TSAN
      if (b->contexts.empty())
        t->tsan = __tsan_create_fiber(0);
      else {
        t->tsan = b->contexts.back();
        b->contexts.pop_back();
      }
#endif
      leave_rt(t);
      hb_acquire(b);
      (*b->body)();
      hb_release(b->end);
      enter_rt();
      t->done = true;
      b->exited++;
      Warp& w = b->warps[t->warp];
      w.live &= ~(1u << t->lane);
      for (WarpOp& o : w.ops) release_warp(b, t->warp, o);
      if (b->arrived && b->arrived + b->exited == b->n) release_block(b);
#ifdef SIMT_TSAN
      again = false;  // a stack reused by the next CUDA thread would look like a race
#endif
    }
#ifdef SIMT_TSAN
    b->spent.push_back(cur);
#else
    b->idle.push_back(cur);
#endif
    cur->th = nullptr;
    switch_to(&b->sched);
  }
}
SIMT_RT Fiber* new_fiber(Block* b) {
  if (!b->idle.empty()) {
    Fiber* f = b->idle.back();
    b->idle.pop_back();
    return f;
  }
  b->fibers.emplace_back(new Fiber);
  Fiber* f = b->fibers.back().get();
  f->size = STACK;
  char* s = (char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (s == MAP_FAILED) die("no memory for stacks");
  void** sp = (void**)(s + STACK - 64);
  *sp = (void*)&fiber_main;
  f->stack = s;
  f->sp = sp - 6;  // six saved registers, then the entry address
  return f;
}
SIMT_RT void run_block(Block* b) {
  stats.threads += b->n;
  running = b;
  cur = &b->sched;
  long sw = 0;
#ifdef SIMT_TSAN
  b->sched.fake = __tsan_get_current_fiber();
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);  // what the runtime does on fibers' stacks is no race
#endif
  hb_release(b);
  for (Fiber* f; b->exited < b->n; ++sw, switch_to(f)) {
    if (!b->ready.empty()) {
      std::swap(b->ready[b->shuffle ? b->rng() % b->ready.size() : 0], b->ready.back());
      f = b->ready.back()->fib;
      b->ready.pop_back();
    } else if (b->next < b->n)
      f = new_fiber(b);
    else {
      for (Thread& t : b->th)
        if (!t.done) self = &t;
      die("deadlock: this thread waits for threads that never arrive", std::abs(self->site));
    }
  }
  if (b->ordered) {
    hb_acquire(b->end);
    b->idle.insert(b->idle.end(), b->spent.begin(), b->spent.end());
    b->spent.clear();
  }
  self = nullptr;
  stats.switches += sw;
#ifdef SIMT_TSAN
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  if (b->ordered)
    for (Thread& t : b->th) b->contexts.push_back(t.tsan);  // TSan contexts cost about 1 ms each
#endif
}
inline int env(const char* n, int d) {
  const char* s = std::getenv(n);
  return s ? std::atoi(s) : d;
}
struct Launch {
  unsigned long blocks, threads;
};
inline Launch last_launch;
template <class... P, class... A>
void launch(void (*k)(P...), dim3 g, dim3 bd, size_t smem, A&&... a) {
  std::tuple<P...> args(static_cast<P>(a)...);
  const std::function<void()> body = [&] { std::apply(k, args); };
  unsigned long total = (unsigned long)g.x * g.y * g.z;
  unsigned n = bd.x * bd.y * bd.z;
  if (!n || n > 1024 || bd.z > 64 || !total || g.y > 65535 || g.z > 65535 || smem > 232448)
    die("launch outside CUDA's limits");
  last_launch = {total, n};
  if (env("SIMT_DRY_RUN", 0)) return;
  std::atomic<unsigned long> nextb{0};
  auto worker = [&](unsigned wid) {
    std::vector<std::unique_ptr<char[]>> keep;
    Block b;
    b.contexts.swap(spare_contexts);
    b.ordered = !env("SIMT_RACE_BLOCKS", 0);
    b.bdim = bd;
    b.gdim = g;
    b.n = n;
    b.body = &body;
    int seed = env("SIMT_SEED", 0);
    b.shuffle = seed > 0;
    b.rng.seed(seed + wid);
    for (unsigned long i; (i = nextb++) < total;) {
      if (b.ordered)
        keep.clear();  // SIMT_RACE_BLOCKS=1 (TSan): also report races between blocks; for kernels with no static
                       // __shared__
      keep.emplace_back(smem ? new char[smem] : nullptr);
      b.dyn = keep.back().get();
      if (smem) std::memset(b.dyn, 0xff, smem);  // poison: NaN as float, half and bf16
      b.bid = {unsigned(i % g.x), unsigned(i / g.x % g.y), unsigned(i / g.x / g.y)};
      b.next = b.exited = b.arrived = b.gen = 0;
      b.site = b.acc[0] = b.acc[1] = 0;
      b.ready.clear();
      b.th.assign(n, Thread{});
      b.warps.assign((n + 31) / 32, Warp{});
      for (unsigned t = 0; t < n; ++t) {
        Thread& x = b.th[t];
        x.tid = {t % bd.x, t / bd.x % bd.y, t / bd.x / bd.y};
        x.warp = t / 32;
        x.lane = t % 32;
        x.blk = &b;
        b.warps[x.warp].live |= 1u << x.lane;
      }
      run_block(&b);
    }
    hb_acquire(b.end);
    b.contexts.swap(spare_contexts);
    for (auto& f : b.fibers) {
#ifdef SIMT_ASAN
      __asan_unpoison_memory_region(f->stack, STACK);
#endif
      munmap((void*)f->stack, STACK);
    }
  };
#if defined(SIMT_ASAN) || defined(SIMT_TSAN)
  int nw = 1;
#else
  int nw = (int)std::min<unsigned long>(std::max(1, env("SIMT_WORKERS", 1)), total);
#endif
  std::vector<std::thread> pool;
  for (int i = 1; i < nw; ++i) pool.emplace_back(worker, i);
  worker(0);
  for (auto& t : pool) t.join();
}
template <class T>
uint64_t bits(T v) {
  static_assert(sizeof(T) <= 8, "64 bits at most");
  uint64_t u = 0;
  std::memcpy(&u, &v, sizeof v);
  return u;
}
template <class T>
T unbits(uint64_t u) {
  T v;
  std::memcpy((void*)&v, &u, sizeof v);
  return v;
}
template <class T>
T shfl(int line, unsigned mask, T v, int src) {
  uint64_t s[32];
  unsigned got = warp_sync(mask, bits(v), line, s);
  if (!(got >> src & 1)) die("shuffle reads a lane that did not take part", line);
  return unbits<T>(s[src]);
}
inline unsigned ballot(int line, unsigned mask, bool p) {
  uint64_t s[32];
  unsigned r = 0, got = warp_sync(mask, p, line, s);
  for (int l = 0; l < 32; ++l) r |= unsigned(got >> l & 1 && s[l]) << l;
  return r;
}
inline void syncwarp(int line, unsigned mask = ~0u) { warp_sync(mask, 0, line, nullptr); }
template <class T>
T shfl_idx(int line, unsigned m, T v, int s, int w = 32) {
  return shfl(line, m, v, (lane() & ~(w - 1)) | (s & (w - 1)));
}
template <class T>
T shfl_xor(int line, unsigned m, T v, int x, int w = 32) {
  int s = lane() ^ x;
  return shfl(line, m, v, s / w > lane() / w ? lane() : s);
}
template <class T>
T shfl_down(int line, unsigned m, T v, unsigned d, int w = 32) {
  int s = lane() + int(d);
  return shfl(line, m, v, s / w != lane() / w ? lane() : s);
}
template <class T>
T shfl_up(int line, unsigned m, T v, unsigned d, int w = 32) {
  int s = lane() - int(d);
  return shfl(line, m, v, s < (lane() & ~(w - 1)) ? lane() : s);
}
template <class T, class F>
T rmw(T* p, F f) {
  using U = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  U* q = (U*)p;
  U old = __atomic_load_n(q, __ATOMIC_RELAXED);
  for (;;)
    if (U nw = (U)bits<T>(f(unbits<T>(old)));
        __atomic_compare_exchange_n(q, &old, nw, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
      return unbits<T>(old);
}
}  // namespace simt
#define __shfl_sync(...) simt::shfl_idx(__LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) simt::shfl_xor(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) simt::shfl_down(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) simt::shfl_up(__LINE__, __VA_ARGS__)
#define __syncwarp(...) simt::syncwarp(__LINE__ __VA_OPT__(, ) __VA_ARGS__)
#define __ballot_sync(m, p) simt::ballot(__LINE__, m, !!(p))
#define __any_sync(m, p) (simt::ballot(__LINE__, m, !!(p)) != 0)
#define __all_sync(m, p) (simt::ballot(__LINE__, m, !(p)) == 0)
inline unsigned __activemask() { return simt::live(); }
template <class T>
T atomicAdd(T* p, T v) {
  return simt::rmw(p, [=](T o) { return T(o + v); });
}
template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
T atomicMax(T* p, T v) {
  return simt::rmw(p, [=](T o) { return o < v ? v : o; });
}
template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
T atomicMin(T* p, T v) {
  return simt::rmw(p, [=](T o) { return v < o ? v : o; });
}
template <class T>
T atomicExch(T* p, T v) {
  return simt::rmw(p, [=](T) { return v; });
}
template <class T>
T atomicCAS(T* p, T c, T v) {
  return simt::rmw(p, [=](T o) { return simt::bits(o) == simt::bits(c) ? v : o; });
}
template <class T>
T atomicOr(T* p, T v) {
  return simt::rmw(p, [=](T o) { return T(o | v); });
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline void __threadfence() {}
inline float __int_as_float(int i) { return simt::unbits<float>(uint32_t(i)); }
inline int __float_as_int(float f) { return int(simt::bits(f)); }
inline unsigned __float_as_uint(float f) { return unsigned(simt::bits(f)); }
inline float __uint_as_float(unsigned u) { return simt::unbits<float>(u); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
using std::max;
using std::min;
