// The radiance field on a CPU: look-ups in planes and the decoder, for batches of points, forward and backward.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "parallel.h"
#include "simd.h"
#include "volume_render.h"

namespace spherehead::SPHEREHEAD_ISA {

// Memory that is handed out in aligned pieces.
class Arena {
  public:
    explicit Arena(std::int64_t bytes) : begin_(static_cast<char*>(std::aligned_alloc(kAlign, round_up(bytes)))), next_(begin_) {
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
    static std::int64_t round_up(std::int64_t bytes) { return (bytes + kAlign) / kAlign * kAlign; }
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

// Points of one scene, and what the field computes on the way. `kept` arrays have one entry per point.
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

// Neighbours along every axis of one plane, for a block of points.
template <class T>
struct PlaneTaps {
    static constexpr int kPoints = 64, kMaxDims = 3;
    std::int32_t low[kMaxDims][kPoints], high[kMaxDims][kPoints];  // in elements of memory
    T low_weight[kMaxDims][kPoints], high_weight[kMaxDims][kPoints];
    T low_slope[kMaxDims][kPoints], high_slope[kMaxDims][kPoints];

    // `coordinates` of axis d begin at coordinates[d].
    template <int kDims>
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
                low[d][i] = taps.low * stride, high[d][i] = taps.high * stride;
                low_weight[d][i] = taps.low_weight, high_weight[d][i] = taps.high_weight;
                low_slope[d][i] = taps.low_slope, high_slope[d][i] = taps.high_slope;
            }
        }
    }

    // Calls f(offset, weight) for the 4 or 8 neighbours of point i.
    template <int kDims, class F>
    SPHEREHEAD_FN void for_each(std::int64_t i, const F& f) const {
        for (int corner = 0; corner < (1 << kDims); ++corner) {
            std::int64_t offset = 0;
            T weight = 1;
            for (int d = kDims - 1; d >= 0; --d) {
                const bool is_high = corner >> d & 1;
                offset += is_high ? high[d][i] : low[d][i];
                weight *= is_high ? high_weight[d][i] : low_weight[d][i];
            }
            f(offset, weight);
        }
    }

    // d weight / d coordinate of axis d of the neighbour `corner`.
    template <int kDims>
    SPHEREHEAD_FN T slope(std::int64_t i, int corner, int along) const {
        T product = 1;
        for (int d = 0; d < kDims; ++d) {
            const bool is_high = corner >> d & 1;
            if (d == along)
                product *= is_high ? high_slope[d][i] : low_slope[d][i];
            else
                product *= is_high ? high_weight[d][i] : low_weight[d][i];
        }
        return product;
    }
};

template <class T>
struct Tap {
    std::int64_t offset;
    T weight;
};

// The field of one scene.
template <class T, class Representation>
class FieldOfScene {
  public:
    using Batch = PointBatch<T, Representation>;
    static constexpr int kDims = Representation::kDims, kNumPlanes = Representation::kNumPlanes;
    static constexpr int kCorners = 1 << kDims, kNumTaps = kNumPlanes * kCorners;

    FieldOfScene(const Field& field, const Decoder<T>& decoder, std::int64_t scene)
        : field_(field), decoder_(decoder), planes_(static_cast<const T*>(field.planes) + scene * field.scene_stride) {}

    // Fills everything but the positions of points [begin, batch.count).
    void evaluate(Batch& batch, std::int64_t begin = 0) const {
        locate(batch, begin);
        for (std::int64_t i = begin; i < batch.count; i += PlaneTaps<T>::kPoints)
            look_up(batch, i, std::min(batch.count, i + PlaneTaps<T>::kPoints));
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
        constexpr int kPoints = PlaneTaps<T>::kPoints;
        T g_coordinates[Representation::kNumCoordinates][kPoints], g_weights[Representation::kNumWeights][kPoints];
        PlaneTaps<T> taps;
        for (std::int64_t begin = 0; begin < batch.count; begin += kPoints) {
            const std::int64_t count = std::min<std::int64_t>(kPoints, batch.count - begin);
            for (auto& row : g_coordinates) std::fill(row, row + kPoints, T(0));
            for (auto& row : g_weights) std::fill(row, row + kPoints, T(0));
            for (int p = 0; p < kNumPlanes; ++p) {
                locate_plane(batch, p, begin, count, taps);
                const T* const plane = planes_ + p * field_.plane_stride;
                const T* const weights = batch.weights + Representation::group(p) * batch.capacity + begin;
                for (std::int64_t i = 0; i < count; ++i) {
                    T products[kCorners];  // g_features . texel
                    texel_products(plane, taps, i, g_features + (begin + i) * decoder_.channels_padded, products);
                    T value = 0, slopes[kDims] = {};
                    int corner = 0;
                    taps.template for_each<kDims>(i, [&](std::int64_t, T w) { value += w * products[corner++]; });
                    for (int c = 0; c < kCorners; ++c)
                        for (int d = 0; d < kDims; ++d) slopes[d] += taps.template slope<kDims>(i, c, d) * products[c];
                    g_weights[Representation::group(p)][i] += value;
                    for (int d = 0; d < kDims; ++d) g_coordinates[Representation::axis(p, d)][i] += weights[i] * slopes[d];
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
        constexpr int kPoints = PlaneTaps<T>::kPoints;
        constexpr int kRowCorner = 2;  // the bit of a corner that stands for the height axis
        const std::int64_t low_row = row_begin * field_.row_stride, high_row = row_end * field_.row_stride;
        T* const to = g_planes + plane * field_.plane_stride;
        weights += Representation::group(plane) * capacity;
        PlaneTaps<T> taps;
        for (std::int64_t begin = 0; begin < count; begin += kPoints) {
            const std::int64_t block = std::min<std::int64_t>(kPoints, count - begin);
            const T* along[kDims];
            for (int d = 0; d < kDims; ++d) along[d] = coordinates + Representation::axis(plane, d) * capacity + begin;
            taps.locate(along, block, field_);
            for (std::int64_t i = 0; i < block; ++i) {
                const T* const g = g_features + (begin + i) * decoder_.channels_padded;
                const std::int32_t rows[2] = {taps.low[1][i], taps.high[1][i]};
                int corner = 0;
                taps.template for_each<kDims>(i, [&](std::int64_t offset, T weight) {
                    const std::int32_t row = rows[(corner++ & kRowCorner) != 0];
                    if (row >= low_row && row < high_row)
                        add_channels(to + offset, weight * weights[begin + i], g);
                });
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

    void locate_plane(const Batch& batch, int plane, std::int64_t begin, std::int64_t count, PlaneTaps<T>& taps) const {
        const T* along[kDims];
        for (int d = 0; d < kDims; ++d)
            along[d] = batch.coordinates + Representation::axis(plane, d) * batch.capacity + begin;
        taps.locate(along, count, field_);
    }

    void look_up(Batch& batch, std::int64_t begin, std::int64_t end) const {
        static thread_local PlaneTaps<T> taps[kNumPlanes];
        for (int p = 0; p < kNumPlanes; ++p) locate_plane(batch, p, begin, end - begin, taps[p]);
        for (std::int64_t i = 0; i < end - begin; ++i) {
            Tap<T> all[kNumTaps];
            int n = 0;
            for (int p = 0; p < kNumPlanes; ++p) {
                const T factor = batch.weights[Representation::group(p) * batch.capacity + begin + i];
                const std::int64_t plane = p * field_.plane_stride;
                taps[p].template for_each<kDims>(i, [&](std::int64_t offset, T weight) {
                    all[n++] = {plane + offset, weight * factor};
                });
            }
            sum_taps(all, batch.features + (begin + i) * decoder_.channels_padded);
        }
    }

    void sum_taps(const Tap<T> (&taps)[kNumTaps], T* out) const {
        constexpr int L = kNativeLanes<T>;
        std::int64_t c = 0;
        for (; c + 4 * L <= field_.channels; c += 4 * L) sum_taps_of<L, 4>(taps, c, out);
        for (; c + 2 * L <= field_.channels; c += 2 * L) sum_taps_of<L, 2>(taps, c, out);
        for (; c + 8 <= field_.channels; c += 8) sum_taps_of<kSmallLanes, 8 / kSmallLanes>(taps, c, out);
    }

    template <int L, int kVectors>
    SPHEREHEAD_FN void sum_taps_of(const Tap<T> (&taps)[kNumTaps], std::int64_t channel, T* out) const {
        Vec<T, L> sums[kVectors] = {};
        for (const Tap<T>& tap : taps)
            for (int v = 0; v < kVectors; ++v)
                sums[v] += tap.weight * load<T, L>(planes_ + tap.offset + channel + v * L);
        for (int v = 0; v < kVectors; ++v) store<T, L>(out + channel + v * L, sums[v]);
    }

    void texel_products(const T* plane, const PlaneTaps<T>& taps, std::int64_t i, const T* g,
                        T (&products)[kCorners]) const {
        constexpr int L = kSmallLanes;
        Vec<T, L> sums[kCorners] = {};
        std::int64_t offsets[kCorners];
        int corner = 0;
        taps.template for_each<kDims>(i, [&](std::int64_t offset, T) { offsets[corner++] = offset; });
        for (std::int64_t c = 0; c < field_.channels; c += L) {
            const Vec<T, L> gradient = load<T, L>(g + c);
            for (int k = 0; k < kCorners; ++k) sums[k] += gradient * load<T, L>(plane + offsets[k] + c);
        }
        for (int k = 0; k < kCorners; ++k) products[k] = sum_lanes<T, L>(sums[k]);
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

}  // namespace spherehead::SPHEREHEAD_ISA
