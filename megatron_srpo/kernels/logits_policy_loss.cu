// Logits to log-prob, entropy and d loss / d logits, each logit read from memory once.
//
// A cluster of blocks has a row; it keeps the row in the shared memory of its multiprocessors while
// it finds the softmax. Statistics are those of rows.py and formulas those of loss.py, but for
// differences to the maximum, which are taken before they are divided by the temperature (exact for
// logits that are near it), and exponents, which are of 2: u and shifts are in that unit.
//
// A thread fetches, meets again and overwrites the same 16-byte vectors: its copies need no barrier.
// Sums are ordered, there are no atomics: two runs give the same bits.

#include <algorithm>
#include <cfloat>
#include <cooperative_groups.h>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

namespace cg = cooperative_groups;

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int MAX_CLUSTER = 8;  // what every device with clusters offers
constexpr int AHEAD = 4;        // vectors that a thread has asked for and not yet met
constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float LN_2 = 0.69314718055994530942f;
constexpr float NEGLIGIBLE = -1000.f;

// The first members are arrays of one element a row. `CudaArguments` in the Python file has the
// same members.
struct Arguments {
  const int64_t* targets;
  const float* temperatures;
  const float* weights;
  const float* advantages;
  const float* rollout;    // NaN: a demonstration
  const float* old;        // may be null: the policy itself
  const float* reference;  // may be null: no KL term
  float* logprobs;
  float* entropies;
  const void* logits;
  void* by_logits;
  int64_t num_rows;
  int64_t row_stride;  // of logits, in elements
  int32_t num_columns;
  int32_t num_real;
  int32_t is_bfloat16;
  int32_t is_ppo;
  int32_t importance;  // 0: none, 1: truncate, 2: mask
  float log_low;
  float log_high;
  float kl_coef;
  float cap;
  float scale;
};

// 16 bytes, what a thread moves at once.
template <typename T>
constexpr int SIZE = 16 / sizeof(T);

__device__ inline void unpack(const uint4& v, float (&x)[4]) {
  const uint32_t bits[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = __uint_as_float(bits[i]);
}

__device__ inline void unpack(const uint4& v, float (&x)[8]) {  // bfloat16: upper half of a float
  const uint32_t bits[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = __uint_as_float(bits[i] << 16);
    x[2 * i + 1] = __uint_as_float(bits[i] & 0xffff0000u);
  }
}

__device__ inline uint4 packed(const float (&x)[4]) {
  return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                    __float_as_uint(x[3]));
}

__device__ inline uint4 packed(const float (&x)[8]) {
  uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    __nv_bfloat162 two = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    bits[i] = *reinterpret_cast<uint32_t*>(&two);
  }
  return make_uint4(bits[0], bits[1], bits[2], bits[3]);
}

struct Statistics {
  float m, s, u;
};

__device__ inline Statistics nothing_seen() { return {-FLT_MAX, 0.f, 0.f}; }

// -1000 and above, so that 0 times it is 0. Maxima do not carry NaN: every s does.
__device__ inline float cut(float difference) { return fmaxf(difference, NEGLIGIBLE); }

template <int NUM>
__device__ inline void absorb(Statistics& seen, const float (&x)[NUM], float to_exponent) {
  float largest = seen.m;
#pragma unroll
  for (int i = 0; i < NUM; i++) largest = fmaxf(largest, x[i]);
  float shift = cut((seen.m - largest) * to_exponent);
  float kept = exp2f(shift);
  seen.u = kept * (seen.u + shift * seen.s);
  seen.s = kept * seen.s;
  seen.m = largest;
#pragma unroll
  for (int i = 0; i < NUM; i++) {
    float difference = (x[i] - largest) * to_exponent;
    float weight = exp2f(difference);
    seen.s += weight;
    seen.u += weight * cut(difference);
  }
}

__device__ inline Statistics merged(const Statistics& a, const Statistics& b, float to_exponent) {
  Statistics both;
  both.m = fmaxf(a.m, b.m);
  float shift_a = cut((a.m - both.m) * to_exponent), kept_a = exp2f(shift_a);
  float shift_b = cut((b.m - both.m) * to_exponent), kept_b = exp2f(shift_b);
  both.s = kept_a * a.s + kept_b * b.s;
  both.u = kept_a * (a.u + shift_a * a.s) + kept_b * (b.u + shift_b * b.s);
  return both;
}

__device__ inline Statistics of_warp(Statistics own, float to_exponent) {
  for (int distance = 16; distance; distance /= 2) {
    Statistics other;
    other.m = __shfl_xor_sync(~0u, own.m, distance);
    other.s = __shfl_xor_sync(~0u, own.s, distance);
    other.u = __shfl_xor_sync(~0u, own.u, distance);
    own = merged(own, other, to_exponent);
  }
  return own;
}

// d loss / d log-prob of a row's target, as in loss.py.
__device__ inline float slope(const Arguments& a, int64_t row, float logprob) {
  const bool is_demonstration = isnan(a.rollout[row]);
  const float advantage = a.advantages[row], weight = a.weights[row] * a.scale;
  float credit = weight * advantage;
  if (is_demonstration) return -credit;
  const float old = a.old ? a.old[row] : logprob;
  if (a.importance) {
    const float importance = expf(old - a.rollout[row]);
    const bool is_above = importance > a.cap;
    credit *= is_above ? (a.importance == 1 ? a.cap : 0.f) : importance;
  }
  if (a.is_ppo) {
    const float log_ratio = logprob - old;
    const bool bites = (advantage > 0.f && log_ratio > a.log_high) ||
                       (advantage < 0.f && log_ratio < a.log_low);
    credit *= bites ? 0.f : expf(log_ratio);
  }
  if (!a.reference) return -credit;
  return -credit - a.kl_coef * weight * expm1f(a.reference[row] - logprob);
}

// This block's columns of the row, in vectors that the threads take in turn.
template <typename T>
struct Part {
  const T* logits;
  T* by_logits;
  uint4* kept;   // shared memory
  int first;     // column of the row
  int length;    // columns of the block, of which ...
  int num_real;  // ... the first are tokens
  bool is_aligned_in, is_aligned_out;

  __device__ Part(const Arguments& a, int64_t row, int rank, int share, uint4* shared)
      : kept(shared) {
    first = min(rank * share, a.num_columns);
    length = min(share, a.num_columns - first);
    num_real = max(0, min(length, a.num_real - first));
    logits = static_cast<const T*>(a.logits) + row * a.row_stride + first;
    by_logits = static_cast<T*>(a.by_logits) + row * a.num_columns + first;
    is_aligned_in = reinterpret_cast<uintptr_t>(logits) % 16 == 0;
    is_aligned_out = reinterpret_cast<uintptr_t>(by_logits) % 16 == 0;
  }

  __device__ int num_vectors() const { return (length + SIZE<T> - 1) / SIZE<T>; }

  __device__ void fetch(int vector) const {
    int start = vector * SIZE<T>;
    if (is_aligned_in && start + SIZE<T> <= num_real) {
      __pipeline_memcpy_async(&kept[vector], logits + start, 16);
      return;
    }
    T* here = reinterpret_cast<T*>(kept);
    for (int column = start; column < start + SIZE<T>; column++)
      here[column] = column < num_real ? logits[column] : static_cast<T>(-INFINITY);
  }

  __device__ void write(int vector, const float (&x)[SIZE<T>]) const {
    int start = vector * SIZE<T>;
    if (is_aligned_out && start + SIZE<T> <= length) {
      *reinterpret_cast<uint4*>(by_logits + start) = packed(x);
      return;
    }
#pragma unroll
    for (int i = 0; i < SIZE<T>; i++) {
      if (start + i < length) by_logits[start + i] = static_cast<T>(x[i]);
    }
  }
};

// Columns of each block but the last: whole vectors.
template <typename T>
__host__ __device__ inline int share_of(int num_columns, int num_blocks) {
  int in_turn = num_blocks * SIZE<T>;
  return (num_columns / in_turn + (num_columns % in_turn != 0)) * SIZE<T>;
}

template <typename T>
__device__ inline Statistics streamed(const Part<T>& part, float to_exponent) {
  const int num_vectors = part.num_vectors();
  int next = threadIdx.x;
  for (int i = 0; i < AHEAD; i++, next += THREADS) {
    if (next < num_vectors) part.fetch(next);
    __pipeline_commit();
  }
  Statistics seen = nothing_seen();
  for (int vector = threadIdx.x; vector < num_vectors; vector += THREADS, next += THREADS) {
    __pipeline_wait_prior(AHEAD - 1);
    float x[SIZE<T>];
    unpack(part.kept[vector], x);
    if (next < num_vectors) part.fetch(next);
    __pipeline_commit();
    absorb(seen, x, to_exponent);
  }
  return seen;
}

template <typename T>
__device__ inline void zero(const Part<T>& part) {
  const float nothing[SIZE<T>] = {};
  for (int vector = threadIdx.x; vector < part.num_vectors(); vector += THREADS)
    part.write(vector, nothing);
}

template <typename T>
__global__ void __launch_bounds__(THREADS) logits_policy_loss(const Arguments a) {
  extern __shared__ uint4 row_in_shared_memory[];
  __shared__ Statistics of_warps[WARPS], of_block, of_row;
  __shared__ float by_logprob_shared;
  cg::cluster_group cluster = cg::this_cluster();
  const int rank = cluster.block_rank(), num_blocks = cluster.num_blocks();
  const int thread = threadIdx.x;
  const int64_t row = blockIdx.x / num_blocks;
  const int share = share_of<T>(a.num_columns, num_blocks);
  const Part<T> part(a, row, rank, share, row_in_shared_memory);
  if (a.weights[row] == 0.f) {  // the whole cluster: nobody waits for it
    zero(part);
    if (rank == 0 && thread == 0) a.logprobs[row] = a.entropies[row] = 0.f;
    return;
  }
  const float per_temperature = 1.f / a.temperatures[row], to_exponent = per_temperature * LOG2_E;
  const int64_t target = a.targets[row];
  const bool is_token = target >= 0 && target < a.num_real;
  float of_target = -INFINITY;
  if (thread == 0 && is_token)
    of_target = static_cast<float>(part.logits[target - part.first]);

  Statistics seen = of_warp(streamed(part, to_exponent), to_exponent);
  if (thread % 32 == 0) of_warps[thread / 32] = seen;
  __syncthreads();
  if (thread == 0) {
    for (int i = 1; i < WARPS; i++) seen = merged(seen, of_warps[i], to_exponent);
    of_block = seen;
  }
  cluster.sync();
  if (thread < 32) {
    seen = nothing_seen();
    if (thread < num_blocks) seen = *cluster.map_shared_rank(&of_block, thread);
    seen = of_warp(seen, to_exponent);
  }
  cluster.barrier_arrive();  // no other block needs this one's memory any more
  if (thread == 0) {
    float log_sum = logf(seen.s);
    float logprob = (of_target - seen.m) * per_temperature - log_sum;
    of_row = seen;
    by_logprob_shared = slope(a, row, logprob);
    if (rank == 0) {
      a.logprobs[row] = logprob;
      a.entropies[row] = log_sum - seen.u / seen.s * LN_2;
    }
  }
  __syncthreads();
  const float largest = of_row.m, by_target = by_logprob_shared * per_temperature;
  const float by_weight = by_target / of_row.s;
  const auto gradient = [=](float x) { return -by_weight * exp2f((x - largest) * to_exponent); };
  for (int vector = thread; vector < part.num_vectors(); vector += THREADS) {
    float x[SIZE<T>];
    unpack(part.kept[vector], x);
#pragma unroll
    for (int i = 0; i < SIZE<T>; i++) x[i] = gradient(x[i]);
    part.write(vector, x);
  }
  const int64_t here = target - part.first;
  if (is_token && here >= 0 && here < part.num_real && here / SIZE<T> % THREADS == thread) {
    T x = reinterpret_cast<const T*>(part.kept)[here];  // this thread wrote there, too
    part.by_logits[here] = static_cast<T>(gradient(static_cast<float>(x)) + by_target);
  }
  cluster.barrier_wait();
}

// x times a factor that is nearly always 1, and then costs no memory traffic.
template <typename T>
__global__ void __launch_bounds__(THREADS) scale(T* x, const float* factor, int64_t length) {
  const float by = *factor;
  if (by == 1.f) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  const int64_t num_vectors = length / SIZE<T>;
  for (int64_t i = first; i < num_vectors; i += step) {
    uint4& here = reinterpret_cast<uint4*>(x)[i];
    float values[SIZE<T>];
    unpack(here, values);
#pragma unroll
    for (int j = 0; j < SIZE<T>; j++) values[j] *= by;
    here = packed(values);
  }
  for (int64_t i = num_vectors * SIZE<T> + first; i < length; i += step)
    x[i] = static_cast<T>(static_cast<float>(x[i]) * by);
}

template <typename T>
static cudaError_t launch(const Arguments& a, int num_blocks, cudaStream_t stream) {
  cudaLaunchAttribute cluster[1];
  cluster[0].id = cudaLaunchAttributeClusterDimension;
  cluster[0].val.clusterDim.x = num_blocks;
  cluster[0].val.clusterDim.y = cluster[0].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(a.num_rows * num_blocks));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = share_of<T>(a.num_columns, num_blocks) * sizeof(T);
  config.stream = stream;
  config.attrs = cluster;
  config.numAttrs = 1;
  cudaError_t error = cudaFuncSetAttribute(
      logits_policy_loss<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
      static_cast<int>(config.dynamicSmemBytes));
  return error ? error : cudaLaunchKernelEx(&config, logits_policy_loss<T>, a);
}

// All return 0, or what `error_name` puts in words. `device` is the one the memory is on.
extern "C" int logits_policy_loss_launch(const Arguments* a, int num_blocks, int device,
                                         void* stream) {
  if (num_blocks < 1 || num_blocks > MAX_CLUSTER) return cudaErrorInvalidValue;
  cudaError_t error = cudaSetDevice(device);
  if (error) return error;
  cudaStream_t on = static_cast<cudaStream_t>(stream);
  return a->is_bfloat16 ? launch<__nv_bfloat16>(*a, num_blocks, on)
                        : launch<float>(*a, num_blocks, on);
}

extern "C" int scale_launch(void* x, const float* factor, int64_t length, int is_bfloat16,
                            int device, void* stream) {
  cudaError_t error = cudaSetDevice(device);
  if (error) return error;
  const int64_t in_block = THREADS * (is_bfloat16 ? SIZE<__nv_bfloat16> : SIZE<float>);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(length / in_block + 1, 1024)));
  config.blockDim = dim3(THREADS);
  config.stream = static_cast<cudaStream_t>(stream);
  return is_bfloat16 ? cudaLaunchKernelEx(&config, scale<__nv_bfloat16>,
                                          static_cast<__nv_bfloat16*>(x), factor, length)
                     : cudaLaunchKernelEx(&config, scale<float>, static_cast<float*>(x), factor,
                                          length);
}

extern "C" const char* error_name(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
