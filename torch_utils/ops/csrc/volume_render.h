// Volume rendering on host and device: what a call is given, and the formulas of ray sampling and marching.
//
// Pointers are to float (or double, where the kernel's name says so); tensors are contiguous unless strides are given.
// Shape letters: B scenes, R rays per scene, S coarse and F fine samples per ray, M points per scene, P planes,
// C channels, D depth (1 for planes), H height, W width, U hidden units of the decoder, O colour features.
#pragma once

#include "representations.h"

namespace spherehead {

enum ActivationId : std::int64_t { kNoActivation = 0, kSigmoid = 1, kLeakyRelu = 2 };

// These structures are repeated in torch_utils/ops/volume_render_native.py, field by field.

// A radiance field: planes [B, P, C, D, H, W] whose channels are adjacent in memory, and the decoder.
struct Field {
    const void *planes;
    const void *hidden_weight, *hidden_bias;  // [U, C], [U]
    const void *output_weight, *output_bias;  // [1 + O, U], [1 + O]; density first
    std::int64_t scenes, channels, depth, height, width;
    std::int64_t scene_stride, plane_stride, depth_stride, row_stride, column_stride;  // in elements
    std::int64_t hidden, outputs;
    std::int64_t representation, activation;
    double box_scale;  // from world units to those of the representation's cube [-1, 1]^3
};

// Gradients of a field, added to what is there; planes with the strides of the field's. Null where not wanted.
struct FieldGradients {
    void *planes, *hidden_weight, *hidden_bias, *output_weight, *output_bias;
};

struct Rays {
    const void *origins, *directions;       // [B, R, 3]
    const void *near_limits, *far_limits;   // [B, R]
    const void *coarse_jitter;              // [B, R, S]
    const void *importance;                 // [B, R, F]
    const void *coarse_noise, *fine_noise;  // [B, R, S], [B, R, F]; null without density noise
    std::int64_t rays, coarse, fine;
    std::int64_t disparity;  // whether coarse samples are even in 1 / depth
    double crop_limit;       // |x| and |z| beyond which density is removed, in world units
    double density_noise;
};

struct RenderOutputs {
    void *features;      // [B, R, O]
    void *depth;         // [B, R], 0 where the accumulation is
    void *accumulation;  // [B, R]
    void *depth_range;   // [B, R, 2]: first and last sample
};

struct RenderGradients {
    const void *features, *depth, *accumulation;  // of the outputs
    FieldGradients field;
    void *origins, *directions, *near_limits, *far_limits;  // overwritten; null where not wanted
};

struct Points {
    const void *points;  // [B, M, 3]
    const void *noise;   // [B, M], standard normal; null adds none
    std::int64_t count;  // M
    double density_noise;
};

}  // namespace spherehead

namespace spherehead::SPHEREHEAD_ISA {

constexpr double kRemovedSigma = -1000.0;      // of cropped samples
constexpr double kLeakyReluSlope = 0.2, kLeakyReluGain = 1.4142135623730951;
constexpr double kSigmoidMargin = 0.001;       // mip-NeRF: lets the sigmoid reach 0 and 1
constexpr double kMinRelativeDisparity = 0.1;  // jitter would else carry the last sample through infinity
constexpr double kTransmittanceEps = 1e-10, kWeightFloor = 0.01, kPdfEps = 1e-5;

// The colour activation and its derivative.
template <class T>
SPHEREHEAD_FN T activate(T x, std::int64_t activation) {
    if (activation == kSigmoid) return sigmoid(x) * T(1 + 2 * kSigmoidMargin) - T(kSigmoidMargin);
    if (activation == kLeakyRelu) return (x < T(0) ? x * T(kLeakyReluSlope) : x) * T(kLeakyReluGain);
    return x;
}

template <class T>
SPHEREHEAD_FN T activation_slope(T x, std::int64_t activation) {
    if (activation == kSigmoid) {
        const T s = sigmoid(x);
        return s * (T(1) - s) * T(1 + 2 * kSigmoidMargin);
    }
    if (activation == kLeakyRelu) return (x > T(0) ? T(1) : T(kLeakyReluSlope)) * T(kLeakyReluGain);
    return T(1);
}

// Coarse sample `index` of `count`: position in [0, 1 + 1 / (count - 1)) between the limits, and depth.
template <class T>
SPHEREHEAD_FN T coarse_fraction(std::int64_t index, T jitter, std::int64_t count) {
    return T(index) / T(count - 1) + jitter / T(count - 1);
}

template <class T>
SPHEREHEAD_FN T coarse_depth(T fraction, T near_limit, T far_limit, bool disparity) {
    if (!disparity) return near_limit + (far_limit - near_limit) * fraction;
    const T inverse = (T(1) - fraction) / near_limit + fraction / far_limit;
    return T(1) / max_of(inverse, T(kMinRelativeDisparity) / far_limit);
}

// One interval of the quadrature: alpha = 1 - exp(-softplus(sigma - 1) delta) for the mean sigma of its ends.
template <class T>
struct Interval {
    T alpha;      // opacity
    T survival;   // 1 - alpha + 1e-10
    T density;    // softplus(sigma - 1)

    SPHEREHEAD_FN static Interval at(T sigma, T delta) {
        Interval interval;
        interval.density = softplus(sigma - T(1));
        // Not with expm1: an opacity below the rounding of 1 is 0, so that a ray through nothing has no weight at all.
        // A length is negative where limits run backwards.
        const T optical = interval.density * delta, shrinking = exp_nonpositive(-absolute(optical));
        interval.alpha = T(1) - (optical < T(0) ? T(1) / shrinking : shrinking);
        interval.survival = T(1) - interval.alpha + T(kTransmittanceEps);
        return interval;
    }

    // d alpha / d delta and d alpha / d sigma.
    SPHEREHEAD_FN T delta_slope() const { return density * (T(1) - alpha); }
    SPHEREHEAD_FN T sigma_slope(T delta) const {
        return delta * (T(1) - alpha) * softplus_slope_from_value(density);
    }
};

// Smoothed weight of coarse interval `index` of `count`: max filter, then mean, over neighbours (mip-NeRF), plus a
// floor. `weights[index - 1 ... index + 1]` are read as far as they are there.
template <class T>
SPHEREHEAD_FN T smoothed_weight(const T* weights, std::int64_t index, std::int64_t count) {
    const T here = weights[index];
    const T left = index > 0 ? max_of(weights[index - 1], here) : here;
    const T right = index + 1 < count ? max_of(here, weights[index + 1]) : here;
    return (left + right) * T(0.5) + T(kWeightFloor);
}

// Inverts one bin of a piecewise linear cdf.
template <class T>
SPHEREHEAD_FN T invert_cdf_bin(T uniform, T cdf_low, T cdf_high, T bin_low, T bin_high) {
    T span = cdf_high - cdf_low;
    span = span < T(kPdfEps) ? T(1) : span;
    return bin_low + (uniform - cdf_low) / span * (bin_high - bin_low);
}

// Whether a point keeps its density: away from the x and z faces of the box (y is free).
template <class T>
SPHEREHEAD_FN bool is_inside_crop(T x, T z, T limit) {
    return (absolute(x) <= limit) & (absolute(z) <= limit);
}

}  // namespace spherehead::SPHEREHEAD_ISA
