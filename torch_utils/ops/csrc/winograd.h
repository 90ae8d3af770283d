// Winograd convolution F(4x4, 3x3) (Lavin and Gray 2016): 36 products for 16 outputs of a 3x3 filter instead of 144.
#pragma once

#include <cstdint>

namespace spherehead {

// One convolution, 3x3, stride 1, padding 1, of channels-last images. Pointers marked "or null" may be absent.
struct WinogradConv {
    const float* x;       // [B, H, W, I]
    const float* packed;  // weights, from winograd_pack
    const float* styles;  // [B, I] factors of the input channels, or null
    const float* scales;  // [B, O] factors of the output channels, or null
    const float* noise;   // [B or 1, up * H, up * W], added after the scales, or null
    const float* bias;    // [O], or null
    float* out;           // [B, up * H, up * W, O]
    std::int64_t batch, height, width, in_channels, out_channels;
    std::int64_t up;            // 1, or 2: four filters per channel, whose results interleave to an image of twice the size
    std::int64_t noise_stride;  // floats between the noise of two images; 0 shares it
    std::int64_t threads;       // that share the work; has no influence on results
    float slope;                // of the activation where its argument is negative; 1 is linear
    float gain;                 // factor after the activation
    float clamp;                // bound of the absolute value of the result; infinity does not clamp
};

// The transforms evaluate polynomials at 0, +-kA, +-kB and infinity. Of the points tried, these and +-sqrt(1/2),
// +-sqrt(2) round least: five times less than the usual 0, +-1, +-2; these are exact in binary.
constexpr int kTile = 4;    // side of the tile of outputs
constexpr int kWindow = 6;  // side of the window of inputs of a tile
constexpr int kPoints = kWindow * kWindow;
constexpr float kA = 0.75F, kB = 1.5F;
constexpr float kA2 = kA * kA, kB2 = kB * kB, kA3 = kA2 * kA, kB3 = kB2 * kB;

// Transforms six inputs along one axis: rows of B^T are the coefficients of the polynomials that vanish at all other points.
template <class V>
inline void transform_input(const V (&d)[kWindow], V (&v)[kWindow]) {
    const V even_a = d[4] - kB2 * d[2], odd_a = kA * (d[3] - kB2 * d[1]);
    const V even_b = d[4] - kA2 * d[2], odd_b = kB * (d[3] - kA2 * d[1]);
    v[0] = d[4] - (kA2 + kB2) * d[2] + (kA2 * kB2) * d[0];
    v[1] = even_a + odd_a;
    v[2] = even_a - odd_a;
    v[3] = even_b + odd_b;
    v[4] = even_b - odd_b;
    v[5] = d[5] - (kA2 + kB2) * d[3] + (kA2 * kB2) * d[1];
}

// Transforms six products along one axis to four outputs: rows of A^T are powers of the points.
template <class V>
inline void transform_output(const V (&m)[kWindow], V (&y)[kTile]) {
    const V even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + even_a + even_b;
    y[1] = kA * odd_a + kB * odd_b;
    y[2] = kA2 * even_a + kB2 * even_b;
    y[3] = kA3 * odd_a + kB3 * odd_b + m[5];
}

// Transforms three weights along one axis: rows of G are powers of the points over the derivative of the polynomial
// that vanishes at all of them.
inline void transform_filter(const double (&g)[3], double (&u)[kWindow]) {
    constexpr double a = kA, b = kB, a2 = a * a, b2 = b * b;
    constexpr double at_a = 1 / (2 * a2 * (a2 - b2)), at_b = 1 / (2 * b2 * (b2 - a2));
    u[0] = g[0] / (a2 * b2);
    u[1] = at_a * (g[0] + a * g[1] + a2 * g[2]);
    u[2] = at_a * (g[0] - a * g[1] + a2 * g[2]);
    u[3] = at_b * (g[0] + b * g[1] + b2 * g[2]);
    u[4] = at_b * (g[0] - b * g[1] + b2 * g[2]);
    u[5] = g[2];
}

}  // namespace spherehead
