// Winograd convolution (Lavin and Gray 2016): what a convolution is given, and its transforms along one axis.
// In two dimensions F(4, 3) takes 36 products for 16 outputs of a 3x3 filter instead of 144.
#pragma once

#include <cstdint>

namespace spherehead {

// One convolution with 3x3 filters and zeros around channels-last images. Pointers marked "or null" may be absent.
struct WinogradConv {
    const float* x;       // [B, H, W, I]
    const float* packed;  // weights, from winograd_pack or winograd_up_pack
    const float* styles;  // [B, I] factors of the input channels, or null
    const float* scales;  // [B, O] factors of the output channels, or null
    const float* fir;     // [4, 4] filter after upsampling; null without upsampling
    const float* noise;   // [B or 1, H', W'], added after the scales, or null
    const float* bias;    // [O], or null
    float* out;           // [B, H', W', O]; H' = H, W' = W, or twice that with upsampling
    std::int64_t batch, height, width, in_channels, out_channels;
    std::int64_t noise_stride;  // floats between the noise of two images; 0 shares it
    std::int64_t threads;       // that share the work; has no influence on results
    float slope;                // of the activation where its argument is negative; 1 is linear
    float gain;                 // factor after the activation
    float clamp;                // bound of the absolute value of the result; infinity does not clamp
};

constexpr int kTile = 4;          // input pixels, along an axis, that a tile adds to those of its neighbours
constexpr int kFilterPoints = 6;  // transformed weights along an axis, in both schemes
constexpr int kPoints = kFilterPoints * kFilterPoints;

// F(4, 3): four outputs from six inputs. The transforms evaluate polynomials at 0, +-kA, +-kB and infinity. Of the
// points tried, these and +-sqrt(1/2), +-sqrt(2) round least, five times less than the usual 0, +-1, +-2; and these are
// exact in binary.
struct Same {
    static constexpr int kWindow = 6;
    static constexpr float kA = 0.75F, kB = 1.5F;
    static constexpr float kA2 = kA * kA, kB2 = kB * kB, kA3 = kA2 * kA, kB3 = kB2 * kB;

    // Transforms the inputs: rows of B^T are the coefficients of the polynomials that vanish at all other points.
    template <class V>
    static inline void transform_input(const V (&d)[kWindow], V (&v)[kWindow]) {
        const V even_a = d[4] - kB2 * d[2], odd_a = kA * (d[3] - kB2 * d[1]);
        const V even_b = d[4] - kA2 * d[2], odd_b = kB * (d[3] - kA2 * d[1]);
        v[0] = d[4] - (kA2 + kB2) * d[2] + (kA2 * kB2) * d[0];
        v[1] = even_a + odd_a;
        v[2] = even_a - odd_a;
        v[3] = even_b + odd_b;
        v[4] = even_b - odd_b;
        v[5] = d[5] - (kA2 + kB2) * d[3] + (kA2 * kB2) * d[1];
    }

    // Transforms the products: rows of A^T are powers of the points.
    template <class V>
    static inline void transform_output(const V (&m)[kWindow], V (&y)[kTile]) {
        const V even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
        y[0] = m[0] + even_a + even_b;
        y[1] = kA * odd_a + kB * odd_b;
        y[2] = kA2 * even_a + kB2 * even_b;
        y[3] = kA3 * odd_a + kB3 * odd_b + m[5];
    }

    // Transforms the weights: rows of G are powers of the points over the derivative of x (x^2 - a^2) (x^2 - b^2)
    // there.
    static inline void transform_filter(const double (&w)[3], double (&u)[kFilterPoints]) {
        constexpr double a = kA, b = kB, a2 = a * a, b2 = b * b;
        constexpr double at_a = 1 / (2 * a2 * (a2 - b2)), at_b = 1 / (2 * b2 * (b2 - a2));
        u[0] = w[0] / (a2 * b2);
        u[1] = at_a * (w[0] + a * w[1] + a2 * w[2]);
        u[2] = at_a * (w[0] - a * w[1] + a2 * w[2]);
        u[3] = at_b * (w[0] + b * w[1] + b2 * w[2]);
        u[4] = at_b * (w[0] - b * w[1] + b2 * w[2]);
        u[5] = w[2];
    }
};

// Transposed convolution with stride 2, t[m] = sum over i of x[i] w[m - 2 i]. Even results have two taps, t[2 h] = x[h]
// w[0] + x[h - 1] w[2]: F(4, 2) with five products. Odd ones have one, t[2 h - 1] = x[h - 1] w[1]: four products that
// share their weight. A tile has the inputs x[h - 1 .. h + 3] and the eight results t[2 h - 1 .. 2 h + 6].
struct Up {
    static constexpr int kWindow = 5;
    static constexpr int kProducts = kWindow + kTile;  // along an axis; those from kWindow on are of the odd results
    static constexpr int kResults = 2 * kTile;
    static constexpr float kA = 0.5F, kB = 1.25F;  // and infinity; 0 would round twice as much
    static constexpr float kA2 = kA * kA, kB2 = kB * kB, kA3 = kA2 * kA, kB3 = kB2 * kB;

    // Transforms the inputs for the even results; the odd ones take them as they are.
    template <class V>
    static inline void transform_input(const V (&d)[kWindow], V (&v)[kWindow]) {
        const V odd_a = d[3] - kB2 * d[1], even_a = kA * (d[2] - kB2 * d[0]);
        const V odd_b = d[3] - kA2 * d[1], even_b = kB * (d[2] - kA2 * d[0]);
        v[0] = odd_a + even_a;
        v[1] = odd_a - even_a;
        v[2] = odd_b + even_b;
        v[3] = odd_b - even_b;
        v[4] = d[4] - (kA2 + kB2) * d[2] + (kA2 * kB2) * d[0];
    }

    // Transforms the products of both kinds to results in their order.
    template <class V>
    static inline void transform_output(const V (&m)[kProducts], V (&t)[kResults]) {
        const V even_a = m[0] + m[1], odd_a = m[0] - m[1], even_b = m[2] + m[3], odd_b = m[2] - m[3];
        t[1] = even_a + even_b;
        t[3] = kA * odd_a + kB * odd_b;
        t[5] = kA2 * even_a + kB2 * even_b;
        t[7] = kA3 * odd_a + kB3 * odd_b + m[4];
        for (int i = 0; i < kTile; ++i) t[2 * i] = m[kWindow + i];
    }

    // Transforms the weights: as above, with the derivative of (x^2 - a^2) (x^2 - b^2); the last is of the odd results.
    static inline void transform_filter(const double (&w)[3], double (&u)[kFilterPoints]) {
        constexpr double a = kA, b = kB, at_a = 1 / (2 * a * (a * a - b * b)), at_b = 1 / (2 * b * (b * b - a * a));
        u[0] = at_a * (w[2] + a * w[0]);
        u[1] = -at_a * (w[2] - a * w[0]);
        u[2] = at_b * (w[2] + b * w[0]);
        u[3] = -at_b * (w[2] - b * w[0]);
        u[4] = w[0];
        u[5] = w[1];
    }
};

}  // namespace spherehead
