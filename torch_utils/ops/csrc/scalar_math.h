// Elementary functions for host and device. In float on the host they are branch-free polynomials, so that loops over
// them vectorise; elsewhere they are those of the standard library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "export.h"

#ifdef __CUDACC__
#define SPHEREHEAD_FN __host__ __device__ __forceinline__
#else
#define SPHEREHEAD_FN inline __attribute__((always_inline))
#endif

// Loops whose iterations are independent.
#if defined(__clang__)
#define SPHEREHEAD_SIMD _Pragma("clang loop vectorize(enable) interleave(enable)")
#elif defined(__GNUC__) && !defined(__CUDACC__)
#define SPHEREHEAD_SIMD _Pragma("GCC ivdep")
#else
#define SPHEREHEAD_SIMD
#endif

#ifdef __CUDA_ARCH__
#define SPHEREHEAD_ON_DEVICE 1
#else
#define SPHEREHEAD_ON_DEVICE 0
#endif

namespace spherehead::SPHEREHEAD_ISA {

template <class T>
constexpr T kPi = T(3.14159265358979323846);

template <class T>
SPHEREHEAD_FN T min_of(T a, T b) {
    return a < b ? a : b;
}

template <class T>
SPHEREHEAD_FN T max_of(T a, T b) {
    return a > b ? a : b;
}

// Limits x to [low, high]; NaN stays NaN.
template <class T>
SPHEREHEAD_FN T clamp_to(T x, T low, T high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

SPHEREHEAD_FN float float_of_bits(std::int32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// What exp(x), x <= 0, is made of: exp(x) = scale (1 + mantissa), where scale is a power of 2.
struct ExpParts {
    float scale, mantissa;

    SPHEREHEAD_FN static ExpParts of(float x) {
        x = x < -87.0f ? -87.0f : x;  // exp(-87) is the last normal number; NaN stays NaN
        constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
        const float shifted = x * 1.44269504f + magic;
        const float n = shifted - magic;
        // ln 2 in two parts: the first has zeros at the end, so that its product with n is exact.
        const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f, rr = r * r;
        const float p = (5.000000013e-01f + 1.666657700e-01f * r) +
                        rr * ((4.166646498e-02f + 8.363175565e-03f * r) + rr * 1.393364297e-03f);
        std::int32_t bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        return {float_of_bits((bits + 127) << 23), r + rr * p};  // the exponent of `magic` is shifted out
    }
};

// exp(x) - 1 for x <= 0, with the relative error of a few ulp also near 0.
SPHEREHEAD_FN float expm1_nonpositive(float x) {
#if SPHEREHEAD_ON_DEVICE
    return expm1f(x);
#else
    const ExpParts e = ExpParts::of(x);
    return e.scale * e.mantissa + (e.scale - 1.0f);
#endif
}
SPHEREHEAD_FN double expm1_nonpositive(double x) { return ::expm1(x); }

// exp(x) for x <= 0.
SPHEREHEAD_FN float exp_nonpositive(float x) {
#if SPHEREHEAD_ON_DEVICE
    return expf(x);
#else
    const ExpParts e = ExpParts::of(x);
    return e.scale * e.mantissa + e.scale;
#endif
}
SPHEREHEAD_FN double exp_nonpositive(double x) { return ::exp(x); }

// log(1 + u) for u in [0, 1]. One polynomial for all of it: with a choice of two, compilers evaluate both.
SPHEREHEAD_FN float log1p_of_unit(float u) {
#if SPHEREHEAD_ON_DEVICE
    return log1pf(u);
#else
    const float uu = u * u, uuuu = uu * uu;
    const float low = (9.999999705e-01f + -4.999950152e-01f * u) + uu * (3.331927134e-01f + -2.484436989e-01f * u);
    const float high = (1.911143108e-01f + -1.367476970e-01f * u) + uu * (7.836166801e-02f + -2.958850739e-02f * u);
    return u * (low + uuuu * (high + uuuu * 5.253457796e-03f));
#endif
}
SPHEREHEAD_FN double log1p_of_unit(double u) { return ::log1p(u); }

SPHEREHEAD_FN float square_root(float x) {
#if SPHEREHEAD_ON_DEVICE
    return sqrtf(x);
#else
    return __builtin_sqrtf(x);
#endif
}
SPHEREHEAD_FN double square_root(double x) { return ::sqrt(x); }

SPHEREHEAD_FN float round_down(float x) {
#if SPHEREHEAD_ON_DEVICE
    return floorf(x);
#else
    return __builtin_floorf(x);
#endif
}
SPHEREHEAD_FN double round_down(double x) { return ::floor(x); }

// Angle of (x, y) in [-pi, pi]; 0 at the origin.
SPHEREHEAD_FN float arc_tangent(float y, float x) {
#if SPHEREHEAD_ON_DEVICE
    return atan2f(y, x);
#else
    const float ax = __builtin_fabsf(x), ay = __builtin_fabsf(y);
    const float larger = ax > ay ? ax : ay, smaller = ax > ay ? ay : ax;
    const float a = smaller / (larger > 0.0f ? larger : 1.0f), z = a * a;
    float p = -1.743701136e-03f;
    p = p * z + 1.068071941e-02f;
    p = p * z + -3.071750884e-02f;
    p = p * z + 5.746355778e-02f;
    p = p * z + -8.372063944e-02f;
    p = p * z + 1.094019896e-01f;
    p = p * z + -1.426157368e-01f;
    p = p * z + 1.999823064e-01f;
    p = p * z + -3.333328230e-01f;
    p = p * z + 9.999999975e-01f;
    p = p * a;
    p = ay > ax ? 1.57079633f - p : p;
    p = x < 0.0f ? 3.14159265f - p : p;
    return y < 0.0f ? -p : p;
#endif
}
SPHEREHEAD_FN double arc_tangent(double y, double x) { return ::atan2(y, x); }

template <class T>
SPHEREHEAD_FN T absolute(T x) {
    return x < T(0) ? -x : x;
}

// log(1 + exp(x)). Above 20 PyTorch returns x itself, which is what float rounds to.
SPHEREHEAD_FN float softplus(float x) {
    const float positive = x < 0.0f ? 0.0f : x;  // NaN stays NaN
    return positive + log1p_of_unit(exp_nonpositive(-absolute(x)));
}
SPHEREHEAD_FN double softplus(double x) {
    return x > 20.0 ? x : (x < 0.0 ? 0.0 : x) + log1p_of_unit(exp_nonpositive(-absolute(x)));
}

// d softplus(x) / dx from the value h = softplus(x) >= 0.
template <class T>
SPHEREHEAD_FN T softplus_slope_from_value(T h) {
    return -expm1_nonpositive(-h);
}

template <class T>
SPHEREHEAD_FN T sigmoid(T x) {
    const T u = exp_nonpositive(-absolute(x)), reciprocal = T(1) / (T(1) + u);
    return x < T(0) ? u * reciprocal : reciprocal;
}

}  // namespace spherehead::SPHEREHEAD_ISA
