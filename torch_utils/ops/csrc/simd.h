// Vectors of the compiler (GCC and clang extensions), in the width of the instruction set a file is compiled for, and
// small matrix products on them.
#pragma once

#include <cstdint>
#include <cstring>

#include "scalar_math.h"

namespace spherehead::SPHEREHEAD_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif

template <class T, int kLanes>
struct VectorOf {
    typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <class T, int kLanes>
using Vec = typename VectorOf<T, kLanes>::type;

template <class T>
constexpr int kNativeLanes = kVectorBytes / int(sizeof(T));

// Rows of internal buffers are padded to this many elements, with zeros.
constexpr int kRowMultiple = kVectorBytes == 64 ? 32 : 16;
constexpr std::int64_t padded(std::int64_t count) { return (count + kRowMultiple - 1) / kRowMultiple * kRowMultiple; }

template <class T, int kLanes>
SPHEREHEAD_FN Vec<T, kLanes> load(const T* p) {
    Vec<T, kLanes> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class T, int kLanes>
SPHEREHEAD_FN void store(T* p, Vec<T, kLanes> v) {
    std::memcpy(p, &v, sizeof v);
}

template <class T, int kLanes>
SPHEREHEAD_FN T sum_lanes(Vec<T, kLanes> v) {
    T lanes[kLanes];
    std::memcpy(lanes, &v, sizeof v);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// sum_i a[i] b[i] over `count`, a multiple of kRowMultiple.
template <class T>
SPHEREHEAD_FN T dot(const T* a, const T* b, std::int64_t count) {
    constexpr int L = kNativeLanes<T>;
    Vec<T, L> sum{};
    for (std::int64_t i = 0; i < count; i += L) sum += load<T, L>(a + i) * load<T, L>(b + i);
    return sum_lanes<T, L>(sum);
}

// y += factor x over `count`, a multiple of kRowMultiple.
template <class T>
SPHEREHEAD_FN void add_scaled(T* y, T factor, const T* x, std::int64_t count) {
    constexpr int L = kNativeLanes<T>;
    for (std::int64_t i = 0; i < count; i += L) store<T, L>(y + i, load<T, L>(y + i) + factor * load<T, L>(x + i));
}

// A matrix by its element strides; columns of the right factor and of the result are adjacent.
template <class T>
struct Matrix {
    const T* data;
    std::int64_t row_stride, column_stride;
};

template <class T, int kRows, int kVectors>
SPHEREHEAD_FN void multiply_tile(std::int64_t inner, Matrix<T> a, const T* b, std::int64_t b_stride, const T* initial,
                                 bool add, T* out, std::int64_t out_stride) {
    constexpr int L = kNativeLanes<T>;
    Vec<T, L> sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v)
            sums[r][v] = add       ? load<T, L>(out + r * out_stride + v * L)
                         : initial ? load<T, L>(initial + v * L)
                                   : Vec<T, L>{};
    for (std::int64_t k = 0; k < inner; ++k) {
        Vec<T, L> right[kVectors];
        for (int v = 0; v < kVectors; ++v) right[v] = load<T, L>(b + k * b_stride + v * L);
        for (int r = 0; r < kRows; ++r) {
            const T left = a.data[r * a.row_stride + k * a.column_stride];
            for (int v = 0; v < kVectors; ++v) sums[r][v] += left * right[v];
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) store<T, L>(out + r * out_stride + v * L, sums[r][v]);
}

template <class T, int kRows, int kVectors>
void multiply_rows(std::int64_t columns, std::int64_t inner, Matrix<T> a, const T* b, std::int64_t b_stride,
                   const T* initial, bool add, T* out, std::int64_t out_stride) {
    constexpr int kColumns = kVectors * kNativeLanes<T>;
    for (std::int64_t c = 0; c < columns; c += kColumns)
        multiply_tile<T, kRows, kVectors>(inner, a, b + c, b_stride, initial ? initial + c : nullptr, add, out + c,
                                          out_stride);
}

// out [rows, columns] = a [rows, inner] b [inner, columns], plus `initial` [columns] (null: zeros), or plus `out` itself
// if `add`. `columns` is a multiple of kRowMultiple.
template <class T>
void multiply(std::int64_t rows, std::int64_t columns, std::int64_t inner, Matrix<T> a, const T* b,
              std::int64_t b_stride, const T* initial, bool add, T* out, std::int64_t out_stride) {
    constexpr int kVectors = 2;
    constexpr int kTileRows = kVectorRegisters == 32 ? 12 : 6;
    std::int64_t r = 0;
    const auto run = [&]<int kRows>() {
        multiply_rows<T, kRows, kVectors>(columns, inner, {a.data + r * a.row_stride, a.row_stride, a.column_stride}, b,
                                          b_stride, initial, add, out + r * out_stride, out_stride);
        r += kRows;
    };
    while (rows - r >= kTileRows) run.template operator()<kTileRows>();
    while (rows - r >= 4) run.template operator()<4>();
    while (rows - r >= 1) run.template operator()<1>();
}

}  // namespace spherehead::SPHEREHEAD_ISA
