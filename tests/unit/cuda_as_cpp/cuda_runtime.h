// CUDA source as C++: blocks are threads of the operating system, CUDA threads are fibers of theirs.
//
// As much of CUDA as the package's kernels use, clusters among it. A fiber runs until it waits, so
// what is checked is values, bounds of shared memory and, in both orders of running, most missing
// barriers; memory models and speed are not.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ thread_local
#define __restrict__

using std::isnan;
using std::max;
using std::min;

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float __uint_as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
inline uint32_t __float_as_uint(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) {
    uint32_t wide = __float_as_uint(x);
    bits = isnan(x) ? 0x7fff : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  }
  operator float() const { return __uint_as_float(uint32_t(bits) << 16); }
};
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }

// --- fibers ---

constexpr int SHARED_BYTES = 227 * 1024 - 1024, CANARY = 64;
constexpr unsigned char POISON = 0xff;
alignas(16) thread_local uint4 row_in_shared_memory[(SHARED_BYTES + CANARY) / 16];

struct Barrier {
  int here = 0, generation = 0;
};
struct Cluster {
  std::atomic<int> here{0}, generation{0};
  std::vector<char*> anchors;
};
struct Copy {
  void* to;
  const void* from;
  size_t size;
};
struct Fiber {
  ucontext_t context;
  std::deque<std::vector<Copy>> copies{1};  // in groups, of which the last is not committed
  std::vector<char> stack = std::vector<char>(32768);
  bool is_done = false;
  int num_shuffles = 0, cluster_generation = 0;
};
struct Warp {
  Barrier barrier;
  float given[2][32];
};
struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  int here_for_cluster = 0, running = 0, rank = 0;
  Cluster* cluster = nullptr;
  ucontext_t scheduler;
  std::function<void()> body;
};

inline thread_local Block* block = nullptr;
inline thread_local char anchor;
inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 gridDim, blockDim;
inline int is_reversed = 0;
extern "C" void set_reversed(int value) { is_reversed = value; }

inline std::atomic<bool> is_misaligned{false};
inline Fiber& own_fiber() { return block->fibers[block->running]; }

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size) {
  auto bits = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (bits % size) is_misaligned = true;
  own_fiber().copies.back().push_back({to, from, size});
}
inline void __pipeline_commit() { own_fiber().copies.emplace_back(); }
inline void __pipeline_wait_prior(size_t num_left) {  // nothing is there before it is waited for
  auto& copies = own_fiber().copies;
  for (; copies.size() - 1 > num_left; copies.pop_front())
    for (Copy& one : copies.front()) memcpy(one.to, one.from, one.size);
}

inline void yield() { swapcontext(&own_fiber().context, &block->scheduler); }

inline void wait_at(Barrier& barrier, int num) {
  int generation = barrier.generation;
  if (++barrier.here == num) {
    barrier.here = 0;
    barrier.generation++;
  }
  while (barrier.generation == generation) yield();
}

inline void __syncthreads() { wait_at(block->barrier, int(block->fibers.size())); }

inline float __shfl_xor_sync(unsigned, float value, int distance) {
  int thread = threadIdx.x, lane = thread % 32;
  Warp& warp = block->warps[thread / 32];
  float* given = warp.given[block->fibers[thread].num_shuffles++ % 2];
  given[lane] = value;
  wait_at(warp.barrier, 32);
  return given[lane ^ distance];
}

namespace cooperative_groups {
struct cluster_group {
  unsigned block_rank() const { return block->rank; }
  unsigned num_blocks() const { return unsigned(block->cluster->anchors.size()); }
  void barrier_arrive() const {
    Cluster& cluster = *block->cluster;
    own_fiber().cluster_generation = cluster.generation;
    if (++block->here_for_cluster < int(block->fibers.size())) return;
    block->here_for_cluster = 0;
    if (++cluster.here < int(num_blocks())) return;
    cluster.here = 0;
    cluster.generation++;
  }
  void barrier_wait() const {
    int generation = own_fiber().cluster_generation;
    while (block->cluster->generation == generation) yield();
  }
  void sync() const {
    barrier_arrive();
    barrier_wait();
  }
  template <typename T>
  T* map_shared_rank(T* here, int rank) const {
    std::ptrdiff_t distance = reinterpret_cast<char*>(here) - &anchor;
    return reinterpret_cast<T*>(block->cluster->anchors[rank] + distance);
  }
};
inline cluster_group this_cluster() { return {}; }
}  // namespace cooperative_groups

inline void run_fiber() {
  block->body();
  own_fiber().is_done = true;
  yield();
}

inline void run_block(Block& own) {
  block = &own;
  int num_threads = int(own.fibers.size());
  for (Fiber& fiber : own.fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (bool is_left = true; is_left; std::this_thread::yield()) {
    is_left = false;
    for (int i = 0; i < num_threads; i++) {
      own.running = is_reversed ? num_threads - 1 - i : i;
      if (own.fibers[own.running].is_done) continue;
      is_left = true;
      threadIdx = {unsigned(own.running), 0, 0};
      swapcontext(&own.scheduler, &own.fibers[own.running].context);
    }
  }
}

// --- launches ---

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorIllegalAddress = 700, cudaErrorMisalignedAddress = 716 };
typedef void* cudaStream_t;
enum { cudaLaunchAttributeClusterDimension, cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchAttribute {
  int id;
  struct { dim3 clusterDim; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorIllegalAddress) return "an illegal memory access";
  return error == cudaErrorMisalignedAddress ? "misaligned address" : "invalid argument";
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int bytes) {
  return bytes > SHARED_BYTES ? cudaErrorInvalidValue : cudaSuccess;
}

template <typename... Parameters, typename... Values>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Values... values) {
  unsigned num_blocks = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  int num_threads = config->blockDim.x;
  if (config->dynamicSmemBytes > SHARED_BYTES || config->gridDim.x % num_blocks)
    return cudaErrorInvalidValue;
  std::atomic<bool> is_sound{true};
  for (unsigned first = 0; first < config->gridDim.x; first += num_blocks) {
    Cluster cluster;
    cluster.anchors.resize(num_blocks);
    std::atomic<unsigned> num_ready{0}, num_done{0};
    auto run = [&](unsigned rank) {
      blockIdx = {first + rank, 0, 0};
      gridDim = config->gridDim;
      blockDim = config->blockDim;
      cluster.anchors[rank] = &anchor;
      auto* shared = reinterpret_cast<unsigned char*>(row_in_shared_memory);
      memset(shared, POISON, sizeof row_in_shared_memory);
      Block own;
      own.fibers = std::vector<Fiber>(num_threads);
      own.warps.resize(num_threads / 32);
      own.rank = rank;
      own.cluster = &cluster;
      own.body = [&] { kernel(values...); };
      for (num_ready++; num_ready < num_blocks;) std::this_thread::yield();
      run_block(own);
      for (int i = 0; i < CANARY; i++)
        if (shared[config->dynamicSmemBytes + i] != POISON) is_sound = false;
      for (num_done++; num_done < num_blocks;) std::this_thread::yield();
    };
    std::vector<std::thread> blocks;
    for (unsigned rank = 0; rank < num_blocks; rank++) blocks.emplace_back(run, rank);
    for (std::thread& one : blocks) one.join();
  }
  if (is_misaligned.exchange(false)) return cudaErrorMisalignedAddress;
  return is_sound ? cudaSuccess : cudaErrorIllegalAddress;
}
