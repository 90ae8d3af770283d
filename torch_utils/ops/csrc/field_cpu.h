// The radiance field on a CPU: look-ups in planes and the decoder, for batches of points, forward and backward.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>

#include "parallel.h"
#include "simd.h"
#include "volume_render.h"

namespace spherehead::SPHEREHEAD_ISA {

template <class T>
const T* row(const void* data, std::int64_t index, std::int64_t width) {
    return data ? static_cast<const T*>(data) + index * width : nullptr;
}
template <class T>
T* row(void* data, std::int64_t index, std::int64_t width) {
    return data ? static_cast<T*>(data) + index * width : nullptr;
}

// Memory that is handed out in aligned pieces.
class Arena {
  public:
    explicit Arena(std::int64_t bytes)
        : begin_(static_cast<char*>(std::aligned_alloc(kAlign, round_up(bytes)))), next_(begin_) {
        if (begin_ == nullptr) throw std::bad_alloc();
    }
    ~Arena() { std::free(begin_); }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    template <class T>
    T* take(std::int64_t count) {
        T* piece = reinterpret_cast<T*>(next_);
        next_ += bytes_of<T>(count);
        return piece;
    }

    template <class T>
    static std::int64_t bytes_of(std::int64_t count) {
        return round_up(count * std::int64_t(sizeof(T)));
    }

  private:
    static constexpr std::int64_t kAlign = 64;
    static std::int64_t round_up(std::int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }
    char *begin_, *next_;
};

// The decoder's weights in the order and with the padding that the products want.
template <class T>
class Decoder {
  public:
    explicit Decoder(const Field& field)
        : channels(field.channels), hidden(field.hidden), outputs(field.outputs), channels_padded(padded(channels)),
          hidden_padded(padded(hidden)), outputs_padded(padded(outputs)),
          arena_(Arena::bytes_of<T>(channels * hidden_padded) + Arena::bytes_of<T>(hidden * channels_padded) +
                 2 * Arena::bytes_of<T>(hidden_padded) + Arena::bytes_of<T>(hidden * outputs_padded) +
                 Arena::bytes_of<T>(outputs * hidden_padded) + Arena::bytes_of<T>(outputs_padded)) {
        const T* w1 = static_cast<const T*>(field.hidden_weight);
        const T* w2 = static_cast<const T*>(field.output_weight);
        hidden_weight_t = copy(channels, hidden, hidden_padded, w1, 1, channels);
        hidden_weight = copy(hidden, channels, channels_padded, w1, channels, 1);
        hidden_bias = copy(1, hidden, hidden_padded, static_cast<const T*>(field.hidden_bias), 0, 1);
        sigma_weight = copy(1, hidden, hidden_padded, w2, 0, 1);
        color_weight_t = copy(hidden, outputs, outputs_padded, w2 + hidden, 1, hidden);
        color_weight = copy(outputs, hidden, hidden_padded, w2 + hidden, hidden, 1);
        color_bias = copy(1, outputs, outputs_padded, static_cast<const T*>(field.output_bias) + 1, 0, 1);
        sigma_bias = *static_cast<const T*>(field.output_bias);
    }

    std::int64_t channels, hidden, outputs, channels_padded, hidden_padded, outputs_padded;
    const T *hidden_weight_t, *hidden_weight;  // [C, U'], [U, C'] where ' is padded
    const T *hidden_bias, *sigma_weight;       // [U']
    const T *color_weight_t, *color_weight;    // [U, O'], [O, U']
    const T* color_bias;                       // [O']
    T sigma_bias;

  private:
    const T* copy(std::int64_t rows, std::int64_t columns, std::int64_t width, const T* from, std::int64_t row_stride,
                  std::int64_t column_stride) {
        T* to = arena_.template take<T>(rows * width);
        for (std::int64_t r = 0; r < rows; ++r)
            for (std::int64_t c = 0; c < width; ++c)
                to[r * width + c] = c < columns ? from[r * row_stride + c * column_stride] : T(0);
        return to;
    }

    Arena arena_;
};

// Sums of decoder gradients, which several tasks have one each of.
template <class T>
struct DecoderGradients {
    T* hidden_weight_t;  // [C, U']
    T *hidden_bias, *sigma_weight;  // [U']
    T* color_weight;     // [O, U']
    T* color_bias;       // [O'], and the density's behind it
    T* sigma_bias;

    static std::int64_t size(const Decoder<T>& d) {
        return d.channels * d.hidden_padded + 2 * d.hidden_padded + d.outputs * d.hidden_padded + d.outputs_padded +
               kRowMultiple;
    }

    static DecoderGradients in(T* memory, const Decoder<T>& d) {
        DecoderGradients g;
        g.hidden_weight_t = memory;
        g.hidden_bias = g.hidden_weight_t + d.channels * d.hidden_padded;
        g.sigma_weight = g.hidden_bias + d.hidden_padded;
        g.color_weight = g.sigma_weight + d.hidden_padded;
        g.color_bias = g.color_weight + d.outputs * d.hidden_padded;
        g.sigma_bias = g.color_bias + d.outputs_padded;
        return g;
    }

    // Adds to the gradients that the caller gets.
    void add_to(const FieldGradients& to, const Decoder<T>& d) const {
        T *w1 = static_cast<T*>(to.hidden_weight), *b1 = static_cast<T*>(to.hidden_bias);
        T *w2 = static_cast<T*>(to.output_weight), *b2 = static_cast<T*>(to.output_bias);
        for (std::int64_t u = 0; u < d.hidden; ++u) {
            for (std::int64_t c = 0; c < d.channels; ++c)
                w1[u * d.channels + c] += hidden_weight_t[c * d.hidden_padded + u];
            b1[u] += hidden_bias[u];
            w2[u] += sigma_weight[u];
            for (std::int64_t o = 0; o < d.outputs; ++o)
                w2[(1 + o) * d.hidden + u] += color_weight[o * d.hidden_padded + u];
        }
        b2[0] += *sigma_bias;
        for (std::int64_t o = 0; o < d.outputs; ++o) b2[1 + o] += color_bias[o];
    }
};

// Points of one scene, and what the field computes on the way.
template <class T, class Representation>
struct PointBatch {
    std::int64_t capacity, count = 0;
    T *x, *y, *z;     // in the cube [-1, 1]^3
    T* coordinates;   // [kNumCoordinates, capacity]
    T* weights;       // [kNumWeights, capacity]
    T* features;      // [capacity, C']
    T* hidden;        // [capacity, U']
    T* sigma;         // raw density, without noise

    static std::int64_t bytes(std::int64_t capacity, const Decoder<T>& d) {
        const auto rows = [&](std::int64_t width) { return Arena::bytes_of<T>(capacity * width); };
        return 4 * rows(1) + rows(Representation::kNumCoordinates) + rows(Representation::kNumWeights) +
               rows(d.channels_padded) + rows(d.hidden_padded);
    }

    PointBatch(std::int64_t capacity, const Decoder<T>& d, Arena& arena) : capacity(capacity) {
        const auto rows = [&](std::int64_t width) { return arena.template take<T>(capacity * width); };
        x = rows(1), y = rows(1), z = rows(1), sigma = rows(1);
        coordinates = rows(Representation::kNumCoordinates), weights = rows(Representation::kNumWeights);
        features = rows(d.channels_padded), hidden = rows(d.hidden_padded);
        std::fill(features, features + capacity * d.channels_padded, T(0));
    }
};

// The texels around a block of points in one plane, and their weights.
template <class T, int kDims>
struct PlaneTaps {
    static constexpr int kPoints = 64, kCorners = 1 << kDims;
    std::int32_t offset[kCorners][kPoints];  // in elements of memory
    T weight[kCorners][kPoints];             // of the interpolation

    // Along each axis: of the lower and the higher neighbour.
    T axis_weight[kDims][2][kPoints], axis_slope[kDims][2][kPoints];
    std::int32_t axis_offset[kDims][2][kPoints];

    // `coordinates[d]` are those of axis d: width, height, depth.
    void locate(const T* const (&coordinates)[kDims], std::int64_t count, const Field& field) {
        const std::int32_t sizes[3] = {std::int32_t(field.width), std::int32_t(field.height), std::int32_t(field.depth)};
        const std::int32_t strides[3] = {std::int32_t(field.column_stride), std::int32_t(field.row_stride),
                                         std::int32_t(field.depth_stride)};
        for (int d = 0; d < kDims; ++d) {
            const std::int32_t size = sizes[d], stride = strides[d];
            const T* const along = coordinates[d];
            SPHEREHEAD_SIMD
            for (std::int64_t i = 0; i < count; ++i) {
                const AxisTaps<T> taps = AxisTaps<T>::at(along[i], size);
                axis_offset[d][0][i] = taps.low * stride, axis_offset[d][1][i] = taps.high * stride;
                axis_weight[d][0][i] = taps.low_weight, axis_weight[d][1][i] = taps.high_weight;
                axis_slope[d][0][i] = taps.low_slope, axis_slope[d][1][i] = taps.high_slope;
            }
        }
        for (int corner = 0; corner < kCorners; ++corner) {
            SPHEREHEAD_SIMD
            for (std::int64_t i = 0; i < count; ++i) {
                std::int32_t sum = 0;
                T product = 1;
                for (int d = 0; d < kDims; ++d) {
                    sum += axis_offset[d][corner >> d & 1][i];
                    product *= axis_weight[d][corner >> d & 1][i];
                }
                offset[corner][i] = sum, weight[corner][i] = product;
            }
        }
    }

    // d weight / d coordinate along axis d.
    SPHEREHEAD_FN T slope(int corner, int along, std::int64_t i) const {
        T product = 1;
        for (int d = 0; d < kDims; ++d)
            product *= d == along ? axis_slope[d][corner >> d & 1][i] : axis_weight[d][corner >> d & 1][i];
        return product;
    }
};

// The field of one scene.
template <class T, class Representation>
class FieldOfScene {
  public:
    using Batch = PointBatch<T, Representation>;
    static constexpr int kDims = Representation::kDims, kNumPlanes = Representation::kNumPlanes;
    static constexpr int kCorners = 1 << kDims;
    using Taps = PlaneTaps<T, kDims>;

    FieldOfScene(const Field& field, const Decoder<T>& decoder, std::int64_t scene)
        : field_(field), decoder_(decoder), planes_(static_cast<const T*>(field.planes) + scene * field.scene_stride) {}

    // Fills everything but the positions of points [begin, batch.count).
    void evaluate(Batch& batch, std::int64_t begin = 0) const {
        locate(batch, begin);
        for (std::int64_t i = begin; i < batch.count; i += Taps::kPoints)
            look_up(batch, i, std::min(batch.count, i + Taps::kPoints));
        const Decoder<T>& d = decoder_;
        const std::int64_t count = batch.count - begin;
        T* const hidden = batch.hidden + begin * d.hidden_padded;
        multiply<T>(count, d.hidden_padded, d.channels, {batch.features + begin * d.channels_padded, d.channels_padded, 1},
                    d.hidden_weight_t, d.hidden_padded, d.hidden_bias, false, hidden, d.hidden_padded);
        SPHEREHEAD_SIMD
        for (std::int64_t i = 0; i < count * d.hidden_padded; ++i) hidden[i] = softplus(hidden[i]);
        for (std::int64_t i = 0; i < count; ++i)
            batch.sigma[begin + i] = dot(hidden + i * d.hidden_padded, d.sigma_weight, d.hidden_padded) + d.sigma_bias;
    }

    // Colours before their activation, [count, O'].
    void linear_colors(const Batch& batch, T* colors) const {
        const Decoder<T>& d = decoder_;
        multiply<T>(batch.count, d.outputs_padded, d.hidden, {batch.hidden, d.hidden_padded, 1}, d.color_weight_t,
                    d.outputs_padded, d.color_bias, false, colors, d.outputs_padded);
    }

    // From gradients of the hidden units [count, U'] (overwritten) and of density to those of features [count, C'];
    // adds to the decoder's, except those of the colour layer.
    void backward_decoder(const Batch& batch, const T* g_sigma, T* g_hidden, T* g_features,
                          DecoderGradients<T>& sums) const {
        const Decoder<T>& d = decoder_;
        for (std::int64_t i = 0; i < batch.count; ++i) {
            const T* const h = batch.hidden + i * d.hidden_padded;
            T* const g = g_hidden + i * d.hidden_padded;
            const T gs = g_sigma[i];
            *sums.sigma_bias += gs;
            SPHEREHEAD_SIMD
            for (std::int64_t u = 0; u < d.hidden_padded; ++u) {
                g[u] = (g[u] + gs * d.sigma_weight[u]) * softplus_slope_from_value(h[u]);
                sums.sigma_weight[u] += gs * h[u];
                sums.hidden_bias[u] += g[u];
            }
        }
        multiply<T>(batch.count, d.channels_padded, d.hidden, {g_hidden, d.hidden_padded, 1}, d.hidden_weight,
                    d.channels_padded, nullptr, false, g_features, d.channels_padded);
        multiply<T>(d.channels, d.hidden_padded, batch.count, {batch.features, 1, d.channels_padded}, g_hidden,
                    d.hidden_padded, nullptr, true, sums.hidden_weight_t, d.hidden_padded);
    }

    // From gradients of features [count, C'] to those of positions.
    void backward_positions(const Batch& batch, const T* g_features, T* gx, T* gy, T* gz) const {
        constexpr int kPoints = Taps::kPoints;
        T g_coordinates[Representation::kNumCoordinates][kPoints], g_weights[Representation::kNumWeights][kPoints];
        T products[kCorners][kPoints];  // gradient . texel
        Taps taps;
        for (std::int64_t begin = 0; begin < batch.count; begin += kPoints) {
            const std::int64_t count = std::min<std::int64_t>(kPoints, batch.count - begin);
            for (auto& row : g_coordinates) std::fill(row, row + kPoints, T(0));
            for (auto& row : g_weights) std::fill(row, row + kPoints, T(0));
            for (int p = 0; p < kNumPlanes; ++p) {
                locate_plane(batch, p, begin, count, taps);
                texel_products(p, taps, count, g_features + begin * decoder_.channels_padded, products);
                const T* const weights = batch.weights + Representation::group(p) * batch.capacity + begin;
                T* const g_weight = g_weights[Representation::group(p)];
                for (int corner = 0; corner < kCorners; ++corner) {
                    SPHEREHEAD_SIMD
                    for (std::int64_t i = 0; i < count; ++i) g_weight[i] += taps.weight[corner][i] * products[corner][i];
                }
                for (int d = 0; d < kDims; ++d) {
                    T* const g_coordinate = g_coordinates[Representation::axis(p, d)];
                    for (int corner = 0; corner < kCorners; ++corner) {
                        SPHEREHEAD_SIMD
                        for (std::int64_t i = 0; i < count; ++i)
                            g_coordinate[i] += weights[i] * taps.slope(corner, d, i) * products[corner][i];
                    }
                }
            }
            SPHEREHEAD_SIMD
            for (std::int64_t i = 0; i < count; ++i) {
                T gc[Representation::kNumCoordinates], gw[Representation::kNumWeights];
                for (int k = 0; k < Representation::kNumCoordinates; ++k) gc[k] = g_coordinates[k][i];
                for (int k = 0; k < Representation::kNumWeights; ++k) gw[k] = g_weights[k][i];
                T dx = 0, dy = 0, dz = 0;
                Representation::locate_backward(batch.x[begin + i], batch.y[begin + i], batch.z[begin + i], gc, gw, dx,
                                                dy, dz);
                gx[begin + i] = dx, gy[begin + i] = dy, gz[begin + i] = dz;
            }
        }
    }

    // Adds gradients of features to rows [row_begin, row_end) of one plane. `coordinates` and `weights` are laid out as
    // in a batch with room for `capacity` points.
    void scatter(T* g_planes, int plane, std::int64_t row_begin, std::int64_t row_end, std::int64_t count,
                 std::int64_t capacity, const T* coordinates, const T* weights, const T* g_features) const {
        constexpr int kPoints = Taps::kPoints;
        const std::int64_t low_row = row_begin * field_.row_stride, high_row = row_end * field_.row_stride;
        T* const to = g_planes + plane * field_.plane_stride;
        weights += Representation::group(plane) * capacity;
        Taps taps;
        for (std::int64_t begin = 0; begin < count; begin += kPoints) {
            const std::int64_t block = std::min<std::int64_t>(kPoints, count - begin);
            const T* along[kDims];
            for (int d = 0; d < kDims; ++d) along[d] = coordinates + Representation::axis(plane, d) * capacity + begin;
            taps.locate(along, block, field_);
            for (std::int64_t i = 0; i < block; ++i) {
                const T* const g = g_features + (begin + i) * decoder_.channels_padded;
                for (int corner = 0; corner < kCorners; ++corner) {
                    const std::int32_t row = taps.axis_offset[1][corner >> 1 & 1][i];
                    if (row >= low_row && row < high_row)
                        add_channels(to + taps.offset[corner][i], taps.weight[corner][i] * weights[begin + i], g);
                }
            }
        }
    }

  private:
    void locate(Batch& batch, std::int64_t begin) const {
        const std::int64_t count = batch.count, capacity = batch.capacity;
        T *const coordinates = batch.coordinates, *const weights = batch.weights;
        const T *const x = batch.x, *const y = batch.y, *const z = batch.z;
        SPHEREHEAD_SIMD
        for (std::int64_t i = begin; i < count; ++i) {
            T c[Representation::kNumCoordinates], w[Representation::kNumWeights];
            Representation::locate(x[i], y[i], z[i], c, w);
            for (int k = 0; k < Representation::kNumCoordinates; ++k) coordinates[k * capacity + i] = c[k];
            for (int k = 0; k < Representation::kNumWeights; ++k) weights[k * capacity + i] = w[k];
        }
    }

    void locate_plane(const Batch& batch, int plane, std::int64_t begin, std::int64_t count, Taps& taps) const {
        const T* along[kDims];
        for (int d = 0; d < kDims; ++d)
            along[d] = batch.coordinates + Representation::axis(plane, d) * batch.capacity + begin;
        taps.locate(along, count, field_);
    }

    void look_up(Batch& batch, std::int64_t begin, std::int64_t end) const {
        Taps taps[kNumPlanes];
        for (int p = 0; p < kNumPlanes; ++p) {
            locate_plane(batch, p, begin, end - begin, taps[p]);
            const T* const factors = batch.weights + Representation::group(p) * batch.capacity + begin;
            for (int corner = 0; corner < kCorners; ++corner) {
                SPHEREHEAD_SIMD
                for (std::int64_t i = 0; i < end - begin; ++i) taps[p].weight[corner][i] *= factors[i];
            }
        }
        for (std::int64_t i = 0; i < end - begin; ++i)
            sum_taps(taps, i, batch.features + (begin + i) * decoder_.channels_padded);
    }

    // Calls f(texel, weight) for all neighbours of point i.
    template <class F>
    SPHEREHEAD_FN void for_each_tap(const Taps (&taps)[kNumPlanes], std::int64_t i, const F& f) const {
        for (int p = 0; p < kNumPlanes; ++p)
            for (int corner = 0; corner < kCorners; ++corner)
                f(planes_ + p * field_.plane_stride + taps[p].offset[corner][i], taps[p].weight[corner][i]);
    }

    void sum_taps(const Taps (&taps)[kNumPlanes], std::int64_t i, T* out) const {
        constexpr int L = kNativeLanes<T>;
        std::int64_t c = 0;
        for (; c + 4 * L <= field_.channels; c += 4 * L) sum_taps_of<L, 4>(taps, i, c, out);
        for (; c + 2 * L <= field_.channels; c += 2 * L) sum_taps_of<L, 2>(taps, i, c, out);
        for (; c + 8 <= field_.channels; c += 8) sum_taps_of<kSmallLanes, 8 / kSmallLanes>(taps, i, c, out);
    }

    template <int L, int kVectors>
    SPHEREHEAD_FN void sum_taps_of(const Taps (&taps)[kNumPlanes], std::int64_t i, std::int64_t channel, T* out) const {
        Vec<T, L> sums[kVectors] = {};
        for_each_tap(taps, i, [&](const T* texel, T weight) {
            for (int v = 0; v < kVectors; ++v) sums[v] += weight * load<T, L>(texel + channel + v * L);
        });
        for (int v = 0; v < kVectors; ++v) store<T, L>(out + channel + v * L, sums[v]);
    }

    void texel_products(int p, const Taps& taps, std::int64_t count, const T* g_features,
                        T (&products)[kCorners][Taps::kPoints]) const {
        constexpr int L = kSmallLanes;
        const T* const plane = planes_ + p * field_.plane_stride;
        for (std::int64_t i = 0; i < count; ++i) {
            const T* const g = g_features + i * decoder_.channels_padded;
            Vec<T, L> sums[kCorners] = {};
            for (std::int64_t c = 0; c < field_.channels; c += L) {
                const Vec<T, L> gradient = load<T, L>(g + c);
                for (int corner = 0; corner < kCorners; ++corner)
                    sums[corner] += gradient * load<T, L>(plane + taps.offset[corner][i] + c);
            }
            for (int corner = 0; corner < kCorners; ++corner) products[corner][i] = sum_lanes<T, L>(sums[corner]);
        }
    }

    void add_channels(T* to, T weight, const T* g) const {
        constexpr int L = kSmallLanes;
        for (std::int64_t c = 0; c < field_.channels; c += L)
            store<T, L>(to + c, load<T, L>(to + c) + weight * load<T, L>(g + c));
    }

    static constexpr int kSmallLanes = kNativeLanes<T> < 8 ? kNativeLanes<T> : 8;  // divides every number of channels

    const Field& field_;
    const Decoder<T>& decoder_;
    const T* planes_;
};

// Calls f for the representation of a field; returns 0 when done, 1 without memory, 2 for an unknown representation.
template <class T, class F>
int run_kernel(const Field& field, const F& f) {
    try {
        return with_representation<T>(field.representation, f) ? 0 : 2;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace spherehead::SPHEREHEAD_ISA
