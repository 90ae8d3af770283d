// Where a point is looked up in the planes of each representation: formulas for host and device.
//
// A representation is a struct template with
//   kNumPlanes, kDims          planes, and axes of one plane (2: bilinear, 3: trilinear look-up)
//   kNumCoordinates            coordinates in [-1, 1] that a point has
//   axis(plane, d)             which of them runs along axis d of a plane: width, height, depth
//   kNumWeights, group(plane)  factors, and which of them a plane's features have
//   locate(x, y, z, ...)       coordinates and factors of a point in the cube [-1, 1]^3
//   locate_backward(...)       their vector-Jacobian product
// The features of a point are the sum over planes of factor * look-up. To add one, write the struct and add a line to
// `with_representation`; renderers and field queries need no change.
#pragma once

#include "scalar_math.h"

namespace spherehead::SPHEREHEAD_ISA {

enum RepresentationId : std::int64_t { kDualSpherical = 0, kTriPlane = 1, kTriGrid = 2 };

// Distances whose square is below this are zero: the gradients, in 1 / distance^2, would overflow. tiny^(3/4).
SPHEREHEAD_FN float negligible_square(float) { return 3.56997693e-29f; }
SPHEREHEAD_FN double negligible_square(double) { return 1.8218319894e-231; }

// One sphere with polar axis z; see `spherical_coordinates` in training/representations.py.
template <class T>
struct Sphere {
    T theta, phi, radius, weight;

    SPHEREHEAD_FN static Sphere at(T x, T y, T z) {
        const T rho_sq = x * x + y * y, norm_sq = rho_sq + z * z;
        const bool on_axis = rho_sq < negligible_square(T()), at_origin = norm_sq < negligible_square(T());
        const T rho = on_axis ? T(0) : square_root(rho_sq), norm = at_origin ? T(0) : square_root(norm_sq);
        const T rho_plus_x = plus_x(x, y, rho, on_axis);
        Sphere s;
        s.theta = T(2) / kPi<T> * arc_tangent(rho, at_origin ? T(1) : z) - T(1);
        s.phi = arc_tangent(on_axis ? T(0) : y, on_axis ? T(1) : x) * (T(1) / kPi<T>);
        s.radius = T(1.1547005383792515) * norm - T(1);  // 2 / sqrt(3)
        s.weight = rho * rho_plus_x / (T(2) * (at_origin ? T(1) : norm_sq));
        return s;
    }

    // Adds to (gx, gy, gz) the gradient of theta g.theta + phi g.phi + radius g.radius + weight g.weight.
    SPHEREHEAD_FN static void backward(T x, T y, T z, const Sphere& g, T& gx, T& gy, T& gz) {
        const T rho_sq = x * x + y * y, norm_sq = rho_sq + z * z;
        const bool on_axis = rho_sq < negligible_square(T()), at_origin = norm_sq < negligible_square(T());
        const T rho = on_axis ? T(0) : square_root(rho_sq);
        const T inv_rho = on_axis ? T(0) : T(1) / (on_axis ? T(1) : rho);
        const T inv_norm_sq = at_origin ? T(0) : T(1) / (at_origin ? T(1) : norm_sq);
        const T inv_norm = square_root(inv_norm_sq);
        const T rho_plus_x = plus_x(x, y, rho, on_axis);
        const T weight = rho * rho_plus_x * inv_norm_sq * T(0.5);
        // d theta: (z / norm^2) d rho - (rho / norm^2) d z;  d rho = (x d x + y d y) / rho.
        const T theta_rho = g.theta * (T(2) / kPi<T>) * z * inv_norm_sq * inv_rho;
        const T phi = g.phi * (T(1) / kPi<T>) * inv_rho * inv_rho;
        // d radius, and the part of d weight that comes from 1 / norm^2.
        const T radial = g.radius * T(1.1547005383792515) * inv_norm - g.weight * T(2) * weight * inv_norm_sq;
        const T w = g.weight * T(0.5) * inv_norm_sq * inv_rho;
        gx += theta_rho * x - phi * y + radial * x + w * rho_plus_x * rho_plus_x;
        gy += theta_rho * y + phi * x + radial * y + w * y * (rho + rho_plus_x);
        gz += -g.theta * (T(2) / kPi<T>) * rho * inv_norm_sq + radial * z;
    }

  private:
    // rho + x, which near the seam (x < 0) is y^2 / (rho - x) without cancellation.
    SPHEREHEAD_FN static T plus_x(T x, T y, T rho, bool on_axis) {
        const bool behind = (x < T(0)) & !on_axis;
        return behind ? y * y / (behind ? rho - x : T(1)) : rho + x;
    }
};

// Two spheres of three planes (theta, phi), (theta, r), (phi, r), fused by confidence (SphereHead).
template <class T>
struct DualSpherical {
    static constexpr int kNumPlanes = 6, kDims = 2, kNumCoordinates = 6, kNumWeights = 2;
    SPHEREHEAD_FN static constexpr int group(int plane) { return plane / 3; }
    SPHEREHEAD_FN static constexpr int axis(int plane, int d) {
        return 3 * (plane / 3) + (d == 0 ? (plane % 3) / 2 : 1 + (plane % 3 + 1) / 2);
    }

    SPHEREHEAD_FN static void locate(T x, T y, T z, T* coordinates, T* weights) {
        const Sphere<T> a = Sphere<T>::at(z, y, -x), b = Sphere<T>::at(-z, -x, y);
        coordinates[0] = a.theta, coordinates[1] = a.phi, coordinates[2] = a.radius;
        coordinates[3] = b.theta, coordinates[4] = b.phi, coordinates[5] = b.radius;
        const T scale = T(1) / (T(3) * (a.weight + b.weight + kFusionEps));
        weights[0] = a.weight * scale, weights[1] = b.weight * scale;
    }

    SPHEREHEAD_FN static void locate_backward(T x, T y, T z, const T* g_coordinates, const T* g_weights, T& gx, T& gy,
                                              T& gz) {
        const T wa = Sphere<T>::at(z, y, -x).weight, wb = Sphere<T>::at(-z, -x, y).weight;
        const T inv_total = T(1) / (wa + wb + kFusionEps);
        const T common = (g_weights[0] * wa + g_weights[1] * wb) * inv_total;
        const Sphere<T> ga{g_coordinates[0], g_coordinates[1], g_coordinates[2],
                           (g_weights[0] - common) * inv_total * T(1.0 / 3)};
        const Sphere<T> gb{g_coordinates[3], g_coordinates[4], g_coordinates[5],
                           (g_weights[1] - common) * inv_total * T(1.0 / 3)};
        T ax = 0, ay = 0, az = 0, bx = 0, by = 0, bz = 0;
        Sphere<T>::backward(z, y, -x, ga, ax, ay, az);
        Sphere<T>::backward(-z, -x, y, gb, bx, by, bz);
        gx += -az - by;
        gy += ay + bz;
        gz += ax - bx;
    }

  private:
    static constexpr T kFusionEps = T(1e-8);
};

// Three planes over (x, y), (x, z), (z, x) (EG3D).
template <class T>
struct TriPlane {
    static constexpr int kNumPlanes = 3, kDims = 2, kNumCoordinates = 3, kNumWeights = 1;
    SPHEREHEAD_FN static constexpr int group(int) { return 0; }
    SPHEREHEAD_FN static constexpr int axis(int plane, int d) {
        return d == 0 ? (plane == 2 ? 2 : 0) : (plane == 0 ? 1 : plane == 1 ? 2 : 0);
    }

    SPHEREHEAD_FN static void locate(T x, T y, T z, T* coordinates, T* weights) {
        coordinates[0] = x, coordinates[1] = y, coordinates[2] = z;
        weights[0] = T(1.0 / 3);
    }

    SPHEREHEAD_FN static void locate_backward(T, T, T, const T* g_coordinates, const T*, T& gx, T& gy, T& gz) {
        gx += g_coordinates[0], gy += g_coordinates[1], gz += g_coordinates[2];
    }
};

// Three grids over (x, y, z), (x, z, y), (y, z, x) (PanoHead).
template <class T>
struct TriGrid {
    static constexpr int kNumPlanes = 3, kDims = 3, kNumCoordinates = 3, kNumWeights = 1;
    SPHEREHEAD_FN static constexpr int group(int) { return 0; }
    SPHEREHEAD_FN static constexpr int axis(int plane, int d) {
        return plane == 0 ? d : plane == 1 ? (3 - d) % 3 : (d + 1) % 3;
    }

    SPHEREHEAD_FN static void locate(T x, T y, T z, T* coordinates, T* weights) {
        TriPlane<T>::locate(x, y, z, coordinates, weights);
    }

    SPHEREHEAD_FN static void locate_backward(T x, T y, T z, const T* g_coordinates, const T* g_weights, T& gx, T& gy,
                                              T& gz) {
        TriPlane<T>::locate_backward(x, y, z, g_coordinates, g_weights, gx, gy, gz);
    }
};

// Calls f.template operator()<Representation<T>>() for a RepresentationId; false for an unknown one.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // f is for the host or for the device
#endif
template <class T, class F>
SPHEREHEAD_FN bool with_representation(std::int64_t id, const F& f) {
    switch (id) {
        case kDualSpherical: f.template operator()<DualSpherical<T>>(); return true;
        case kTriPlane: f.template operator()<TriPlane<T>>(); return true;
        case kTriGrid: f.template operator()<TriGrid<T>>(); return true;
        default: return false;
    }
}

// Linear interpolation along one axis of `size` texels: two neighbours, their weights, and the derivatives of the
// weights by the coordinate. Coordinates are those of torch.nn.functional.grid_sample with align_corners=False and
// padding_mode='zeros': a neighbour outside has weight and slope 0 (and the index of some texel that is there).
template <class T>
struct AxisTaps {
    std::int32_t low, high;
    T low_weight, high_weight, low_slope, high_slope;

    // Without branches, and with comparisons of numbers of one type alone, so that loops over it vectorise.
    SPHEREHEAD_FN static AxisTaps at(T coordinate, std::int32_t size) {
        const T last = T(size - 1), position = ((coordinate + T(1)) * T(size) - T(1)) * T(0.5);
        const T limited = clamp_to(position, T(-2), T(size));
        const T below = round_down(limited), fraction = limited - below, slope = T(size) * T(0.5);
        const bool has_low = (below >= T(0)) & (below <= last), has_high = (below >= T(-1)) & (below < last);
        AxisTaps taps;
        taps.low = index_of(below, last), taps.high = index_of(below + T(1), last);
        taps.low_weight = has_low ? T(1) - fraction : fraction * T(0);  // NaN passes through
        taps.high_weight = has_high ? fraction : fraction * T(0);
        taps.low_slope = has_low ? -slope : T(0);
        taps.high_slope = has_high ? slope : T(0);
        return taps;
    }

  private:
    // The nearest index of a texel; NaN has one, too.
    SPHEREHEAD_FN static std::int32_t index_of(T position, T last) {
        position = position > T(0) ? position : T(0);
        return static_cast<std::int32_t>(position < last ? position : last);
    }
};

}  // namespace spherehead::SPHEREHEAD_ISA
