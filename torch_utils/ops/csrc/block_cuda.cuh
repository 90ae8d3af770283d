// What the threads of a block do together: sums, scans, small matrix products.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define SPHEREHEAD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define SPHEREHEAD_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#else
#include "cuda_emulation.h"  // of tests/native: the same kernels as C++ of the host
#endif

#include "scalar_math.h"

#define SPHEREHEAD_DEVICE __device__ __forceinline__

namespace spherehead::SPHEREHEAD_ISA {

constexpr int kWarpLanes = 32, kThreads = 256, kWarps = kThreads / kWarpLanes;
constexpr unsigned kAllLanes = 0xffffffffu;

SPHEREHEAD_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
SPHEREHEAD_DEVICE int lane_index() { return thread_index() % kWarpLanes; }
SPHEREHEAD_DEVICE int warp_index() { return thread_index() / kWarpLanes; }

// Calls f(i) for i in [0, count), shared out among the threads of the block.
template <class F>
SPHEREHEAD_DEVICE void for_each_thread(int count, const F& f) {
    for (int i = thread_index(); i < count; i += kThreads) f(i);
}

// The sum over `kLanes` adjacent lanes, the same bits in each of them.
template <int kLanes = kWarpLanes>
SPHEREHEAD_DEVICE float sum_of_lanes(float x) {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

struct Sum {
    static constexpr float kNeutral = 0.0f;
    SPHEREHEAD_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Product {
    static constexpr float kNeutral = 1.0f;
    SPHEREHEAD_DEVICE float operator()(float a, float b) const { return a * b; }
};

// Exclusive scan over [0, count) by one warp: calls put(i, op of value(0) ... value(i - 1)); returns that of all.
template <class Op, class Value, class Put>
SPHEREHEAD_DEVICE float scan_by_warp(int count, const Value& value, const Put& put) {
    const Op op;
    const int lane = lane_index();
    float before = Op::kNeutral;
    for (int first = 0; first < count; first += kWarpLanes) {
        const int i = first + lane;
        float x = i < count ? value(i) : Op::kNeutral;
#pragma unroll
        for (int distance = 1; distance < kWarpLanes; distance *= 2) {
            const float other = __shfl_up_sync(kAllLanes, x, distance);
            if (lane >= distance) x = op(other, x);
        }
        const float previous = __shfl_up_sync(kAllLanes, x, 1);
        if (i < count) put(i, lane > 0 ? op(before, previous) : before);
        before = op(before, __shfl_sync(kAllLanes, x, kWarpLanes - 1));
    }
    return before;
}

// The sum of value(i) over [0, count) by one warp, in every lane.
template <class Value>
SPHEREHEAD_DEVICE float sum_by_warp(int count, const Value& value) {
    float sum = 0.0f;
    for (int i = lane_index(); i < count; i += kWarpLanes) sum += value(i);
    return sum_of_lanes(sum);
}

// Calls put(column, sum of value(k, column) over k in [0, count)) for `columns` <= kThreads columns. Adjacent threads
// have adjacent columns; `scratch` has kThreads numbers. The order of summation is fixed.
template <class Value, class Put>
SPHEREHEAD_DEVICE void sum_columns(int columns, int count, float* scratch, const Value& value, const Put& put) {
    const int groups = kThreads / columns, group = thread_index() / columns, column = thread_index() % columns;
    if (group < groups) {
        float sum = 0.0f;
        for (int k = group; k < count; k += groups) sum += value(k, column);
        scratch[thread_index()] = sum;
    }
    __syncthreads();
    for_each_thread(columns, [&](int c) {
        float sum = 0.0f;
        for (int g = 0; g < groups; ++g) sum += scratch[g * columns + c];
        put(c, sum);
    });
    __syncthreads();
}

// ---- matrix products ----
//
// Matrices are in shared memory as a rule. A warp computes tiles; a lane computes kTileRows rows of two adjacent
// columns, so that four steps along the inner axis are 8 loads of four numbers from the left, which all lanes of a
// group share, 4 of two numbers from the right, and 64 fused multiply-adds. Rows of the left factor have kRowPadding
// more numbers than columns, which keeps the two groups of a narrow product in different banks. This is where tensor
// cores would come in: with TF32 they do not reach the accuracy of float32.

constexpr int kTileRows = 8, kTileColumns = 2, kRowPadding = 4;

template <int kLanes>
struct MatrixTile {
    static constexpr int kGroups = kWarpLanes / kLanes, kRows = kTileRows * kGroups, kColumns = kTileColumns * kLanes;
    float sums[kTileRows][kTileColumns];

    // Row of a lane's r-th sums, counted from the first row of the tile, and its first column.
    SPHEREHEAD_DEVICE static int row(int r) { return r * kGroups + lane_index() / kLanes; }
    SPHEREHEAD_DEVICE static int column() { return kTileColumns * (lane_index() % kLanes); }

    // a [rows, inner] times columns [first_column, first_column + kColumns) of b; rows beyond the last repeat it.
    SPHEREHEAD_DEVICE void multiply(const float* a, int a_stride, int rows, int inner, const float* b, int b_stride,
                                    int first_column) {
        const float* of_row[kTileRows];
#pragma unroll
        for (int r = 0; r < kTileRows; ++r) {
            of_row[r] = a + min_of(row(r), rows - 1) * a_stride;
            for (int v = 0; v < kTileColumns; ++v) sums[r][v] = 0.0f;
        }
        b += first_column + column();
        int k = 0;
        for (; k + 4 <= inner; k += 4) {
            float4 left[kTileRows];
#pragma unroll
            for (int r = 0; r < kTileRows; ++r) left[r] = *reinterpret_cast<const float4*>(of_row[r] + k);
            add(left, &float4::x, b + k * b_stride);
            add(left, &float4::y, b + (k + 1) * b_stride);
            add(left, &float4::z, b + (k + 2) * b_stride);
            add(left, &float4::w, b + (k + 3) * b_stride);
        }
        for (; k < inner; ++k) {
            const float2 right = *reinterpret_cast<const float2*>(b + k * b_stride);
#pragma unroll
            for (int r = 0; r < kTileRows; ++r) {
                sums[r][0] += of_row[r][k] * right.x;
                sums[r][1] += of_row[r][k] * right.y;
            }
        }
    }

  private:
    SPHEREHEAD_DEVICE void add(const float4 (&left)[kTileRows], float float4::*part, const float* b) {
        const float2 right = *reinterpret_cast<const float2*>(b);
#pragma unroll
        for (int r = 0; r < kTileRows; ++r) {
            sums[r][0] += left[r].*part * right.x;
            sums[r][1] += left[r].*part * right.y;
        }
    }
};

// Calls f(first_row, rows_in_tile) for the tiles of `rows` rows, one warp each.
template <int kLanes, class F>
SPHEREHEAD_DEVICE void for_each_row_tile(int rows, const F& f) {
    constexpr int kRows = MatrixTile<kLanes>::kRows;
    for (int first = warp_index() * kRows; first < rows; first += kWarps * kRows) f(first, min_of(kRows, rows - first));
}

// sums [rows, columns] += sum_k of a[k, :] (outer product) b[k, :]. `rows` is a multiple of 8, `columns` of 2.
SPHEREHEAD_DEVICE void add_outer_products(float* sums, int rows, int columns, int count, const float* a, int a_stride,
                                          const float* b, int b_stride) {
    constexpr int kRows = 8;
    const int pairs = columns / 2;
    for_each_thread(rows / kRows * pairs, [&](int tile) {
        const int row = tile / pairs * kRows, column = tile % pairs * 2;
        float2 sum[kRows];
        float* const to = sums + row * columns + column;
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum[r] = *reinterpret_cast<const float2*>(to + r * columns);
        for (int k = 0; k < count; ++k) {
            const float4 low = *reinterpret_cast<const float4*>(a + k * a_stride + row);
            const float4 high = *reinterpret_cast<const float4*>(a + k * a_stride + row + 4);
            const float2 right = *reinterpret_cast<const float2*>(b + k * b_stride + column);
            const float left[kRows] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int r = 0; r < kRows; ++r) sum[r].x += left[r] * right.x, sum[r].y += left[r] * right.y;
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) *reinterpret_cast<float2*>(to + r * columns) = sum[r];
    });
}

}  // namespace spherehead::SPHEREHEAD_ISA
