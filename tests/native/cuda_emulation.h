// Runs CUDA kernels on the host, for tests without a GPU: block after block, each thread a fibre.
//
// A fibre runs until it waits: for its block (__syncthreads) or for its warp (shuffles, ballots). Which warp runs ahead
// is drawn at random, so that results depend on the seed where a kernel lacks a barrier. Shared memory begins as NaN,
// and what a kernel writes behind it is found.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

// ---- types ----

struct uint3 {
    unsigned x, y, z;
};
using dim3 = uint3;
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

struct __half {
    std::uint16_t bits;
};
struct __nv_bfloat16 {
    std::uint16_t bits;
};

inline float __half2float(__half h) {
    const int exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
    float magnitude = exponent == 0    ? std::ldexp(float(mantissa), -24)
                      : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                       : std::ldexp(float(mantissa + 1024), exponent - 25);
    return h.bits >> 15 ? -magnitude : magnitude;
}
inline float __bfloat162float(__nv_bfloat16 h) {
    const std::uint32_t bits = std::uint32_t(h.bits) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// ---- fibres ----

namespace cuda_emulation {

constexpr std::size_t kStackBytes = 256 << 10, kGuardBytes = 4096;
constexpr int kLanes = 32;
constexpr unsigned char kGuard = 0xa5;

struct Fibre {
    ucontext_t start;
    jmp_buf resume;
    std::unique_ptr<char[]> stack;
    bool started;
    int turn = 0;
};

struct Barrier {
    std::vector<int> waiting;
};

struct Block {
    std::vector<Fibre> fibres;
    std::vector<int> ready;
    std::vector<Barrier> of_warps;
    std::vector<std::uint64_t> slots;  // what lanes show each other
    Barrier of_block;
    jmp_buf scheduler;
    std::function<void()> kernel;
    std::unique_ptr<char[]> shared;
    int running = 0, done = 0;
};

inline Block* block = nullptr;
inline uint3 thread_index, block_index;
inline dim3 block_size, grid_size;
inline std::mt19937 random_numbers;
// Of the device that is imitated.
inline int shared_bytes_per_block = 227 << 10, shared_bytes_per_processor = 228 << 10, processors = 2;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "CUDA emulation: %s\n", what);
    std::abort();
}

// Lets threads go on, warp by warp in random order.
inline void release(std::vector<int>& waiting) {
    std::vector<unsigned> keys(block->of_warps.size());
    for (unsigned& key : keys) key = random_numbers();
    std::stable_sort(waiting.begin(), waiting.end(), [&](int a, int b) { return keys[a / kLanes] < keys[b / kLanes]; });
    block->ready.insert(block->ready.end(), waiting.begin(), waiting.end());
    waiting.clear();
}

inline void wait(Barrier& barrier, int threads) {
    barrier.waiting.push_back(block->running);
    if (int(barrier.waiting.size()) == threads) release(barrier.waiting);
    if (_setjmp(block->fibres[block->running].resume) == 0)  // fibres switch without a system call
        _longjmp(block->scheduler, 1);
}

// Shows the other lanes of the warp a value, and returns what they show. There are two sets of slots, used in turn: who
// writes to one again has waited for everybody who has read it.
template <class T>
const std::uint64_t* exchange(T value) {
    static_assert(sizeof(T) <= sizeof(std::uint64_t));
    Fibre& fibre = block->fibres[block->running];
    fibre.turn ^= 1;
    std::uint64_t* const slots = &block->slots[(2 * (block->running / kLanes) + fibre.turn) * kLanes];
    std::memcpy(&slots[block->running % kLanes], &value, sizeof value);
    wait(block->of_warps[block->running / kLanes], kLanes);
    return slots;
}

// The value of another lane; a lane's own where there is no such lane.
template <class T>
T value_of_lane(T value, int lane) {
    const std::uint64_t* const slots = exchange(value);
    T result = value;
    if (lane >= 0 && lane < kLanes) std::memcpy(&result, &slots[lane], sizeof result);
    return result;
}

inline int lane() { return block->running % kLanes; }

inline void run_fibre() {
    block->kernel();
    ++block->done;
    _longjmp(block->scheduler, 1);
}

// Mostly the thread that became ready last: some warps run ahead as far as barriers let them.
inline int next_fibre(std::vector<int>& ready) {
    if (random_numbers() % 256 == 0) std::swap(ready[random_numbers() % ready.size()], ready.back());
    const int next = ready.back();
    ready.pop_back();
    return next;
}

inline void run_block(Block& b, int threads, std::size_t shared_bytes) {
    std::memset(b.shared.get(), 0xff, shared_bytes);
    std::memset(b.shared.get() + shared_bytes, kGuard, kGuardBytes);
    b.ready.resize(threads), b.done = 0;
    for (int i = 0; i < threads; ++i) b.fibres[i].started = false, b.ready[i] = i;
    std::shuffle(b.ready.begin(), b.ready.end(), random_numbers);
    while (!b.ready.empty()) {
        b.running = next_fibre(b.ready);
        thread_index = {unsigned(b.running), 0, 0};
        if (_setjmp(b.scheduler) != 0) continue;
        Fibre& fibre = b.fibres[b.running];
        if (fibre.started) _longjmp(fibre.resume, 1);
        fibre.started = true;
        getcontext(&fibre.start);
        fibre.start.uc_stack.ss_sp = fibre.stack.get();
        fibre.start.uc_stack.ss_size = kStackBytes;
        fibre.start.uc_link = nullptr;
        makecontext(&fibre.start, run_fibre, 0);
        setcontext(&fibre.start);
    }
    if (b.done != threads) fail("threads wait for each other");
    for (std::size_t i = 0; i < kGuardBytes; ++i)
        if (static_cast<unsigned char>(b.shared[shared_bytes + i]) != kGuard) fail("shared memory was exceeded");
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, unsigned grid, unsigned threads, std::size_t shared_bytes, const Arguments&... arguments) {
    if (threads % kLanes != 0) fail("expected whole warps");
    if (shared_bytes > std::size_t(shared_bytes_per_block)) fail("too much shared memory was asked for");
    Block b;
    b.fibres.resize(threads), b.slots.resize(2 * threads), b.of_warps.resize(threads / kLanes);
    for (Fibre& fibre : b.fibres) fibre.stack.reset(new char[kStackBytes]);
    // alignas of new[] is 16, as that of dynamic shared memory
    b.shared.reset(new char[shared_bytes + kGuardBytes]);
    b.kernel = [&] { kernel(arguments...); };
    block = &b, grid_size = {grid, 1, 1}, block_size = {threads, 1, 1};
    for (unsigned i = 0; i < grid; ++i) {
        block_index = {i, 0, 0};
        run_block(b, int(threads), shared_bytes);
    }
    block = nullptr;
}

inline char* dynamic_shared() { return block->shared.get(); }

}  // namespace cuda_emulation

#define SPHEREHEAD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    (static_cast<void>(stream), cuda_emulation::launch(kernel, grid, block, shared_bytes, __VA_ARGS__))
#define SPHEREHEAD_DYNAMIC_SHARED(name) char* const name = cuda_emulation::dynamic_shared()

// ---- what kernels call ----

#define threadIdx cuda_emulation::thread_index
#define blockIdx cuda_emulation::block_index
#define blockDim cuda_emulation::block_size
#define gridDim cuda_emulation::grid_size

inline void __syncthreads() { cuda_emulation::wait(cuda_emulation::block->of_block, int(blockDim.x)); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return cuda_emulation::value_of_lane(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return cuda_emulation::value_of_lane(value, cuda_emulation::lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
    return cuda_emulation::value_of_lane(value, cuda_emulation::lane() - distance);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    const std::uint64_t* const slots = cuda_emulation::exchange(std::uint64_t(predicate != 0));
    unsigned bits = 0;
    for (int lane = 0; lane < cuda_emulation::kLanes; ++lane) bits |= unsigned(slots[lane]) << lane;
    return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// Fast approximations, with errors as large as NVIDIA's documentation allows.
inline float with_error(float x, float error) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return x + (bits & 1 ? error : -error);
}
inline float __expf(float x) {
    const float exact = std::exp(x);
    return with_error(exact, exact * (2.0f + std::abs(1.173f * x)) * 5.96e-8f);
}
inline float __logf(float x) {
    if (x < 0.5f || x > 2.0f) cuda_emulation::fail("__logf is imitated from 0.5 to 2 only");
    return with_error(std::log(x), 3.6e-7f);
}

template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class T>
T atomicAdd(T* to, T value) {
    const T old = *to;
    *to = old + value;
    return old;
}
template <class T>
T atomicMax(T* to, T value) {
    const T old = *to;
    *to = std::max(old, value);
    return old;
}
inline int __float_as_int(float x) {
    int bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __int_as_float(int bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline long long __float2ll_rn(float x) { return std::llrint(x); }
inline float __ll2float_rn(long long x) { return float(x); }

// ---- runtime library ----

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
enum cudaDeviceAttr {
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor,
    cudaDevAttrMultiProcessorCount
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin       ? cuda_emulation::shared_bytes_per_block
             : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? cuda_emulation::shared_bytes_per_processor
                                                                        : cuda_emulation::processors;
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t shared_bytes) {
    *blocks = int(cuda_emulation::shared_bytes_per_processor / (shared_bytes + 1024));
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
    std::memset(to, value, bytes);
    return cudaSuccess;
}

// For tests: the order of threads, and the device's shared memory.
extern "C" __attribute__((used)) inline void cuda_emulation_configure(unsigned seed, int shared_bytes, int processors) {
    cuda_emulation::random_numbers.seed(seed);
    cuda_emulation::shared_bytes_per_block = shared_bytes - 1024;
    cuda_emulation::shared_bytes_per_processor = shared_bytes;
    cuda_emulation::processors = processors;
}
