// What the two Winograd convolutions on a CPU share: vectors, memory of a thread, matrix product, packing, and the tail
// of a layer.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "export.h"
#include "parallel.h"
#include "winograd.h"

// Before a loop over vectors in registers: compilers do not always see that it should have no counter.
#define SPHEREHEAD_UNROLL _Pragma("GCC unroll 16")

namespace spherehead::SPHEREHEAD_ISA {
namespace {

// Outputs of a step of the matrix product: kRows tiles times kVectors vectors of channels, all in registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12, kVectors = 2;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6, kVectors = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 8, kVectors = 2;
#else
constexpr int kLanes = 4, kRows = 6, kVectors = 2;
#endif
constexpr std::int64_t kPanel = kLanes * kVectors;  // channels of a panel of packed weights, divides 64
constexpr std::int64_t kGroup = 8;                  // channels that the transforms take at a time
constexpr std::int64_t kPad = 16;                   // floats; keeps rows off the same cache set

template <int kSize>
struct VectorOf {
    typedef float Type __attribute__((vector_size(kSize * sizeof(float))));
};
using Lanes = VectorOf<kLanes>::Type;
using Group = VectorOf<kGroup>::Type;

// Vectors are passed by reference: where registers are narrower than they, passing them by value is not portable.
template <class V>
inline void load(V& v, const float* from) {
    std::memcpy(&v, from, sizeof(V));
}

template <class V>
inline void store(float* to, const V& v) {
    std::memcpy(to, &v, sizeof(V));
}

constexpr std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

// Memory of a thread, kept for the next call.
class Scratch {
public:
    float* reserve(std::int64_t floats) {
        if (floats > size_) {
            size_ = 0;
            memory_.reset(static_cast<float*>(::operator new(floats * sizeof(float), kAlignment)));
            size_ = floats;
#if defined(__linux__)
            // A hint: the stages write to more pages at a time than a translation buffer has entries for small ones.
            madvise(memory_.get(), floats * sizeof(float), MADV_HUGEPAGE);
#endif
        }
        return memory_.get();
    }

private:
    static constexpr std::align_val_t kAlignment{2 << 20};  // a huge page
    struct Delete {
        void operator()(float* p) const { ::operator delete(p, kAlignment); }
    };
    std::unique_ptr<float, Delete> memory_;
    std::int64_t size_ = 0;
};

// m[row, panel] = sum over i of v[row, i] * u[i, panel], for `rows_` rows.
template <int rows_>
void multiply_step(const float* v, std::int64_t v_row, const float* u, std::int64_t inputs, float* m,
                   std::int64_t m_row) {
    Lanes sums[rows_][kVectors];
    SPHEREHEAD_UNROLL for (int row = 0; row < rows_; ++row) {
        for (int k = 0; k < kVectors; ++k) sums[row][k] = Lanes{};
    }
    for (std::int64_t i = 0; i < inputs; ++i) {
        Lanes weights[kVectors];
        for (int k = 0; k < kVectors; ++k) load(weights[k], u + i * kPanel + k * kLanes);
        SPHEREHEAD_UNROLL for (int row = 0; row < rows_; ++row) {
            for (int k = 0; k < kVectors; ++k) sums[row][k] += v[row * v_row + i] * weights[k];
        }
    }
    for (int row = 0; row < rows_; ++row) {
        for (int k = 0; k < kVectors; ++k) store(m + row * m_row + k * kLanes, sums[row][k]);
    }
}

using Step = void (*)(const float*, std::int64_t, const float*, std::int64_t, float*, std::int64_t);

template <int... rows_>
constexpr Step step_of(std::int64_t rows, std::integer_sequence<int, rows_...>) {
    constexpr Step steps[] = {multiply_step<rows_ + 1>...};
    return steps[rows - 1];
}

// Multiplies rows of v, at `v_row` floats from each other, by panels of one point's weights, the first `count` columns.
void multiply(const float* v, std::int64_t v_row, std::int64_t rows, const float* u, std::int64_t inputs,
              std::int64_t count, float* m, std::int64_t m_row) {
    constexpr std::int64_t kChunk = 96 / kRows * kRows;  // rows that stay in a second-level cache for all panels
    for (std::int64_t first = 0; first < rows; first += kChunk) {
        const std::int64_t end = std::min(rows, first + kChunk);
        for (std::int64_t column = 0; column < count; column += kPanel) {
            for (std::int64_t row = first; row < end; row += kRows) {
                const auto rows_left = std::min<std::int64_t>(kRows, end - row);
                const Step step = step_of(rows_left, std::make_integer_sequence<int, kRows>{});
                step(v + row * v_row, v_row, u + column * inputs, inputs, m + row * m_row + column, m_row);
            }
        }
    }
}

// Factors and summands of 8 output channels of an image.
struct Tail {
    Tail(const WinogradConv& conv, std::int64_t image, std::int64_t channel) {
        if (conv.scales) load(scale, conv.scales + image * conv.out_channels + channel);
        if (conv.bias) load(bias, conv.bias + channel);
    }

    // Computes what follows the convolution for one pixel, and writes it.
    void finish(const WinogradConv& conv, const Group& sum, const float* noise, float* out) const {
        Group y = sum * scale;
        if (noise) y += *noise;
        y += bias;
        y = (y < 0.0F ? y * conv.slope : y) * conv.gain;  // comparisons keep NaN
        y = y > conv.clamp ? Group{} + conv.clamp : y;
        y = y < -conv.clamp ? Group{} - conv.clamp : y;
        store(out, y);
    }

    Group scale = Group{} + 1.0F, bias = {};
};

// Shares columns out among threads where there are too few other tasks: columns of a task, a multiple of a panel.
inline std::int64_t columns_of_task(const WinogradConv& conv, std::int64_t other_tasks) {
    const std::int64_t shares = std::max<std::int64_t>(1, conv.threads / std::max<std::int64_t>(1, other_tasks));
    return round_up(std::max<std::int64_t>(64, (conv.out_channels + shares - 1) / shares), kPanel);
}

// Transforms the filters of one panel: packed[point][panel][input][channel of the panel].
template <class Scheme>
void pack_panel(const float* weight, std::int64_t inputs, std::int64_t outputs, std::int64_t panel, float* packed) {
    const std::int64_t point_stride = round_up(outputs, kPanel) * inputs;
    for (std::int64_t i = 0; i < inputs; ++i) {
        for (std::int64_t k = 0; k < kPanel; ++k) {
            const std::int64_t output = panel * kPanel + k;
            double rows[3][kFilterPoints] = {}, taps[3], u[kFilterPoints];
            for (int y = 0; y < 3 && output < outputs; ++y) {
                for (int x = 0; x < 3; ++x) taps[x] = weight[((output * inputs + i) * 3 + y) * 3 + x];
                Scheme::transform_filter(taps, rows[y]);
            }
            float* to = packed + (panel * inputs + i) * kPanel + k;
            for (int x = 0; x < kFilterPoints; ++x) {
                for (int y = 0; y < 3; ++y) taps[y] = rows[y][x];
                Scheme::transform_filter(taps, u);
                for (int y = 0; y < kFilterPoints; ++y) {
                    to[(y * kFilterPoints + x) * point_stride] = static_cast<float>(u[y]);
                }
            }
        }
    }
}

template <class Scheme>
void pack(const float* weight, std::int64_t in_channels, std::int64_t out_channels, float* packed) {
    parallel_for(round_up(out_channels, kPanel) / kPanel, [=](std::int64_t panel) {
        pack_panel<Scheme>(weight, in_channels, out_channels, panel, packed);
    });
}

// Calls f(task, scratch memory) for every task; returns 1 where memory is short.
template <class F>
int run_with_scratch(std::int64_t tasks, std::int64_t floats, const F& f) {
    std::atomic<int> status{0};
    parallel_for(tasks, [&](std::int64_t task) {
        static thread_local Scratch scratch;
        try {
            f(task, scratch.reserve(floats));
        } catch (const std::bad_alloc&) {
            status = 1;
        }
    });
    return status;
}

}  // namespace
}  // namespace spherehead::SPHEREHEAD_ISA
