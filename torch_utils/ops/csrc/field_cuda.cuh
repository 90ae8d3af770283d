// The radiance field on a GPU: a block evaluates the points that it holds, forward and backward.
//
// Threads are points where coordinates are computed, channels where planes are read (so that a warp reads whole
// texels), and columns of matrices in the decoder. Everything a block needs lies in shared memory, or, as far as it
// does not fit, in memory of its own.
#pragma once

#include "field_task_cuda.cuh"

namespace spherehead::SPHEREHEAD_ISA {

// ---- texels ----

SPHEREHEAD_DEVICE float to_float(float x) { return x; }
SPHEREHEAD_DEVICE float to_float(__half x) { return __half2float(x); }
SPHEREHEAD_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Channels of 16 bytes.
template <class Texel>
constexpr int kChannelsPerLoad = 16 / int(sizeof(Texel));

template <class Texel>
SPHEREHEAD_DEVICE void load_channels(const Texel* from, float (&to)[kChannelsPerLoad<Texel>]) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from));
    Texel texels[kChannelsPerLoad<Texel>];
    memcpy(texels, &raw, sizeof raw);
#pragma unroll
    for (int c = 0; c < kChannelsPerLoad<Texel>; ++c) to[c] = to_float(texels[c]);
}

// ---- the activation of hidden units ----
//
// There are thousands per ray, so that the functions of the standard library would take more time than the products.
// These approximations err by some 4e-7 of 1, however small the result.

SPHEREHEAD_DEVICE float softplus_of_hidden(float x) {
    const float positive = x < 0.0f ? 0.0f : x;  // NaN stays NaN
    return positive + __logf(1.0f + __expf(-absolute(x)));
}

// From the value h of softplus.
SPHEREHEAD_DEVICE float softplus_slope_of_hidden(float h) { return 1.0f - __expf(-h); }

// ---- neighbours of a point in a plane ----

// Two neighbours along an axis: offsets in elements, and weights.
struct alignas(16) AxisWeights {
    int low, high;
    float low_weight, high_weight;
};

template <int kDims>
struct Corners {
    static constexpr int kCount = 1 << kDims;
    AxisWeights axes[kDims];

    SPHEREHEAD_DEVICE int offset(int corner) const {
        int sum = 0;
#pragma unroll
        for (int d = 0; d < kDims; ++d) sum += corner >> d & 1 ? axes[d].high : axes[d].low;
        return sum;
    }
    SPHEREHEAD_DEVICE float weight(int corner) const {
        float product = 1.0f;
#pragma unroll
        for (int d = 0; d < kDims; ++d) product *= corner >> d & 1 ? axes[d].high_weight : axes[d].low_weight;
        return product;
    }
};

// Numbers are multiplied by 2^exponent before they are rounded to integers: sums of 2^contribution_bits numbers up to
// the largest then stay below 2^62.
SPHEREHEAD_DEVICE int fixed_point_exponent(int bits_of_largest, int contribution_bits) {
    const int power = (bits_of_largest >> 23) - 126;  // largest < 2^power
    return 62 - contribution_bits - power;
}

// ---- what a block does ----

template <bool kAllShared>
class FieldBlock {
  public:
    SPHEREHEAD_DEVICE FieldBlock(const FieldTask& task, char* shared)
        : task(task),
          shape(task.shape),
          shared_(shared),
          global_(kAllShared ? nullptr : task.workspace + std::int64_t(blockIdx.x) * task.plan.global_bytes) {}

    template <class T = float>
    SPHEREHEAD_DEVICE T* at(Buffer buffer) const {
        char* const base = kAllShared || (task.plan.shared_mask >> buffer & 1) ? shared_ : global_;
        return reinterpret_cast<T*>(base + task.plan.offset[buffer]);
    }
    SPHEREHEAD_DEVICE float* scratch() const { return at(kScratch); }
    SPHEREHEAD_DEVICE float* hidden() const { return at(kHidden); }

    // Copies the decoder, with zeros where it is padded.
    SPHEREHEAD_DEVICE void load_decoder() const {
        const float *const w1 = data(task.field.hidden_weight), *const w2 = data(task.field.output_weight);
        const FieldShape& s = shape;
        copy(at(kHiddenWeightT), s.channels, s.hidden_padded, w1, s.channels, s.hidden, 1, s.channels);
        copy(at(kHiddenBias), 1, s.hidden_padded, data(task.field.hidden_bias), 1, s.hidden, 0, 1);
        copy(at(kSigmaWeight), 1, s.hidden_padded, w2, 1, s.hidden, 0, 1);
        copy(at(kColorBias), 1, s.outputs_padded, data(task.field.output_bias) + 1, 1, s.outputs, 0, 1);
        if (task.reads_colors)
            copy(at(kColorWeightT), s.hidden, s.outputs_padded, w2 + s.hidden, s.hidden, s.outputs, 1, s.hidden);
        if (task.backward) {
            copy(at(kHiddenWeight), s.hidden, s.channels_padded, w1, s.hidden, s.channels, s.channels, 1);
            copy(at(kColorWeight), s.outputs_padded, s.hidden_padded, w2 + s.hidden, s.outputs, s.hidden, s.hidden, 1);
            if (task.want_sums) for_each_thread(DecoderSums::of(s).size, [&](int i) { at(kSums)[i] = 0.0f; });
        }
        __syncthreads();
    }

    // From positions of points [begin, end) in the cube to hidden units and raw density. Features stay for the
    // backward pass only.
    SPHEREHEAD_DEVICE void evaluate(std::int64_t scene, int begin, int end) const {
        locate(begin, end);
        __syncthreads();
        for (int first = begin; first < end; first += shape.tile) {
            const int count = min_of(shape.tile, end - first);
            find_taps<false>(first, count);
            __syncthreads();
            with_texels([&](auto dims, auto texel) { look_up<dims.value, decltype(texel)>(scene, first, count); });
            __syncthreads();
            decode_hidden(first, count);
            __syncthreads();
        }
    }

    // Calls f(first_point, points, first_column, tile) for all tiles of the colours of `count` points before their
    // activation; a warp gets the tiles of its points one after the other.
    using ColorTile = MatrixTile<16>;
    template <class F>
    SPHEREHEAD_DEVICE void linear_colors(int count, const F& f) const {
        const float* const bias = at(kColorBias);
        for_each_row_tile<16>(count, [&](int first, int rows) {
            for (int column = 0; column < shape.outputs_padded; column += ColorTile::kColumns) {
                ColorTile tile;
                tile.multiply(hidden() + first * shape.hidden_stride, shape.hidden_stride, rows, shape.hidden,
                              at(kColorWeightT), shape.outputs_padded, column);
#pragma unroll
                for (int r = 0; r < kTileRows; ++r)
#pragma unroll
                    for (int v = 0; v < kTileColumns; ++v) tile.sums[r][v] += bias[column + ColorTile::column() + v];
                f(first, rows, column, tile);
            }
        });
    }

    // From gradients of densities (kPointGradient) and of colours before their activation, a [count, inner] times
    // b [inner, U'], to those of the decoder, of planes and of positions. Colour gradients of the decoder are not its
    // business. Overwrites hidden units, features and positions by their gradients.
    SPHEREHEAD_DEVICE void backward(std::int64_t scene, int count, const float* a, int a_stride, const float* b,
                                    int inner) const {
        if (task.want_sums) add_sigma_sums(count);
        backward_hidden(count, a, a_stride, b, inner);
        __syncthreads();
        if (task.want_sums) add_hidden_sums(count);
        backward_features(count);
        __syncthreads();
        if (task.planes == kFindLargest) find_largest(count);
        const bool adds = task.planes == kAddFloats || task.planes == kAddFixed;
        if (!adds && !task.want_positions) return;
        for (int first = 0; first < count; first += shape.tile) {
            const int tile = min_of(shape.tile, count - first);
            find_taps<true>(first, tile);
            __syncthreads();
            if (adds) add_plane_gradients(scene, first, tile);
            if (task.want_positions) {
                with_texels(
                    [&](auto dims, auto texel) { find_slopes<dims.value, decltype(texel)>(scene, first, tile); });
                __syncthreads();
                backward_locate(first, tile);
            }
            __syncthreads();
        }
    }

    // Adds gradients of the colour layer to the block's sums, given those of colours before their activation in kTaps.
    SPHEREHEAD_DEVICE void add_color_sums(int count) const {
        const DecoderSums sums = DecoderSums::of(shape);
        const float* const g_linear = at(kTaps);
        add_outer_products(at(kSums) + sums.color_weight, shape.outputs_padded, shape.hidden_padded, count, g_linear,
                           shape.color_stride, hidden(), shape.hidden_stride);
        sum_columns(
            shape.outputs_padded, count, scratch(), [&](int i, int o) { return g_linear[i * shape.color_stride + o]; },
            [&](int o, float sum) { at(kSums)[sums.color_bias + o] += sum; });
    }

    // Writes the block's sums to the workspace.
    SPHEREHEAD_DEVICE void store_sums() const {
        if (!task.want_sums) return;
        __syncthreads();
        const int size = DecoderSums::of(shape).size;
        float* const to = task.sums + std::int64_t(blockIdx.x) * size;
        for_each_thread(size, [&](int i) { to[i] = at(kSums)[i]; });
    }

    const FieldTask& task;
    const FieldShape& shape;

  private:
    SPHEREHEAD_DEVICE static const float* data(const void* p) { return static_cast<const float*>(p); }

    SPHEREHEAD_DEVICE static void copy(float* to, int rows, int width, const float* from, int from_rows,
                                       int from_columns, int row_stride, int column_stride) {
        for_each_thread(rows * width, [&](int i) {
            const int r = i / width, c = i % width;
            to[i] = r < from_rows && c < from_columns ? from[r * row_stride + c * column_stride] : 0.0f;
        });
    }

    // Calls f(integral constant: axes of a plane, a texel).
    template <class F>
    SPHEREHEAD_DEVICE void with_texels(const F& f) const {
        if (shape.dims == 2)
            with_texel_type<2>(f);
        else
            with_texel_type<3>(f);
    }
    template <int kDims, class F>
    SPHEREHEAD_DEVICE void with_texel_type(const F& f) const {
        constexpr std::integral_constant<int, kDims> dims{};
        if (shape.texel_type == kFloat32)
            f(dims, float());
        else if (shape.texel_type == kFloat16)
            f(dims, __half());
        else
            f(dims, __nv_bfloat16());
    }

    SPHEREHEAD_DEVICE float* feature_row(int point, int first) const {
        return at(kFeatures) + (task.backward ? point : point - first) * shape.feature_stride;
    }

    SPHEREHEAD_DEVICE void locate(int begin, int end) const {
        const int capacity = shape.capacity;
        with_representation<float>(shape.representation, [&]<class R>() {
            for_each_thread(end - begin, [&](int index) {
                const int i = begin + index;
                float c[R::kNumCoordinates], w[R::kNumWeights];
                R::locate(at(kPointX)[i], at(kPointY)[i], at(kPointZ)[i], c, w);
#pragma unroll
                for (int k = 0; k < R::kNumCoordinates; ++k) at(kCoordinates)[k * capacity + i] = c[k];
#pragma unroll
                for (int k = 0; k < R::kNumWeights; ++k) at(kFactors)[k * capacity + i] = w[k];
            });
        });
    }

    // Within kTaps: weights, then slopes, both [planes, dims, tile], then gradients [planes, dims + 1, tile].
    SPHEREHEAD_DEVICE AxisWeights* taps() const { return at<AxisWeights>(kTaps); }
    SPHEREHEAD_DEVICE float2* slopes() const {
        return reinterpret_cast<float2*>(taps() + shape.planes * shape.dims * shape.tile);
    }
    SPHEREHEAD_DEVICE float* axis_gradients() const {
        return reinterpret_cast<float*>(slopes() + shape.planes * shape.dims * shape.tile);
    }

    template <bool kSlopes>
    SPHEREHEAD_DEVICE void find_taps(int first, int count) const {
        for_each_thread(shape.planes * shape.dims * count, [&](int item) {
            const int axis = item / count, i = item % count, plane = axis / shape.dims, d = axis % shape.dims;
            const float along = at(kCoordinates)[shape.axis[plane][d] * shape.capacity + first + i];
            const AxisTaps<float> found = AxisTaps<float>::at(along, shape.sizes[d]);
            const int stride = shape.strides[d];
            taps()[axis * shape.tile + i] = {found.low * stride, found.high * stride, found.low_weight,
                                             found.high_weight};
            if (kSlopes) slopes()[axis * shape.tile + i] = make_float2(found.low_slope, found.high_slope);
        });
    }

    template <int kDims>
    SPHEREHEAD_DEVICE Corners<kDims> corners(int plane, int i) const {
        Corners<kDims> found;
#pragma unroll
        for (int d = 0; d < kDims; ++d) found.axes[d] = taps()[(plane * kDims + d) * shape.tile + i];
        return found;
    }
    SPHEREHEAD_DEVICE float factor(int plane, int point) const {
        return at(kFactors)[shape.group[plane] * shape.capacity + point];
    }
    template <class Texel>
    SPHEREHEAD_DEVICE const Texel* plane_of(std::int64_t scene, int plane) const {
        return static_cast<const Texel*>(task.field.planes) + scene * task.field.scene_stride +
               plane * task.field.plane_stride;
    }

    // Features of a tile of points: a thread sums 16 bytes of channels over all neighbours.
    template <int kDims, class Texel>
    SPHEREHEAD_DEVICE void look_up(std::int64_t scene, int first, int count) const {
        constexpr int kChannels = kChannelsPerLoad<Texel>;
        const int loads = shape.channels / kChannels;
        for_each_thread(count * loads, [&](int item) {
            const int i = item / loads, channel = item % loads * kChannels;
            float sums[kChannels] = {};
            for (int p = 0; p < shape.planes; ++p) {
                const Corners<kDims> near = corners<kDims>(p, i);
                const Texel* const plane = plane_of<Texel>(scene, p) + channel;
                const float scale = factor(p, first + i);
#pragma unroll
                for (int k = 0; k < Corners<kDims>::kCount; ++k) {
                    float texel[kChannels];
                    load_channels(plane + near.offset(k), texel);
                    const float weight = near.weight(k) * scale;
#pragma unroll
                    for (int c = 0; c < kChannels; ++c) sums[c] += weight * texel[c];
                }
            }
            float* const to = feature_row(first + i, first) + channel;
#pragma unroll
            for (int c = 0; c < kChannels; ++c) to[c] = sums[c];
        });
    }

    SPHEREHEAD_DEVICE void decode_hidden(int first_point, int count) const {
        using Tile = MatrixTile<32>;
        const float *const bias = at(kHiddenBias), *const sigma_weight = at(kSigmaWeight);
        for_each_row_tile<32>(count, [&](int row, int rows) {
            const int first = first_point + row;
            float sigma[kTileRows] = {};
            for (int column = 0; column < shape.hidden_padded; column += Tile::kColumns) {
                Tile tile;
                tile.multiply(feature_row(first, first_point), shape.feature_stride, rows, shape.channels,
                              at(kHiddenWeightT), shape.hidden_padded, column);
                const int u = column + Tile::column();
#pragma unroll
                for (int r = 0; r < kTileRows; ++r) {
                    const float2 h = make_float2(softplus_of_hidden(tile.sums[r][0] + bias[u]),
                                                 softplus_of_hidden(tile.sums[r][1] + bias[u + 1]));
                    sigma[r] += h.x * sigma_weight[u] + h.y * sigma_weight[u + 1];
                    if (r < rows) *reinterpret_cast<float2*>(hidden() + (first + r) * shape.hidden_stride + u) = h;
                }
            }
            const float sigma_bias = *data(task.field.output_bias);
#pragma unroll
            for (int r = 0; r < kTileRows; ++r) {
                const float sum = sum_of_lanes(sigma[r]) + sigma_bias;
                if (r < rows && lane_index() == 0) at(kPointSigma)[first + r] = sum;
            }
        });
    }

    SPHEREHEAD_DEVICE void add_sigma_sums(int count) const {
        const DecoderSums sums = DecoderSums::of(shape);
        const float* const gradient = at(kPointGradient);
        sum_columns(
            shape.hidden_padded, count, scratch(),
            [&](int i, int u) { return gradient[i] * hidden()[i * shape.hidden_stride + u]; },
            [&](int u, float sum) { at(kSums)[sums.sigma_weight + u] += sum; });
        if (warp_index() != 0) return;
        const float sum = sum_by_warp(count, [&](int i) { return gradient[i]; });
        if (lane_index() == 0) at(kSums)[sums.sigma_bias] += sum;
    }

    // Gradients of hidden units before their activation, in the place of hidden units.
    SPHEREHEAD_DEVICE void backward_hidden(int count, const float* a, int a_stride, const float* b, int inner) const {
        using Tile = MatrixTile<32>;
        const float *const gradient = at(kPointGradient), *const sigma_weight = at(kSigmaWeight);
        for_each_row_tile<32>(count, [&](int first, int rows) {
            for (int column = 0; column < shape.hidden_padded; column += Tile::kColumns) {
                Tile tile;
                tile.multiply(a + first * a_stride, a_stride, rows, inner, b, shape.hidden_padded, column);
                const int u = column + Tile::column();
#pragma unroll
                for (int r = 0; r < kTileRows; ++r) {
                    if (r >= rows) continue;
                    float2* const place = reinterpret_cast<float2*>(hidden() + (first + r) * shape.hidden_stride + u);
                    const float2 h = *place;
                    const float g = gradient[first + r];
                    *place = make_float2((tile.sums[r][0] + g * sigma_weight[u]) * softplus_slope_of_hidden(h.x),
                                         (tile.sums[r][1] + g * sigma_weight[u + 1]) * softplus_slope_of_hidden(h.y));
                }
            }
        });
    }

    SPHEREHEAD_DEVICE void add_hidden_sums(int count) const {
        const DecoderSums sums = DecoderSums::of(shape);
        sum_columns(
            shape.hidden_padded, count, scratch(), [&](int i, int u) { return hidden()[i * shape.hidden_stride + u]; },
            [&](int u, float sum) { at(kSums)[sums.hidden_bias + u] += sum; });
        add_outer_products(at(kSums) + sums.hidden_weight_t, shape.channels, shape.hidden_padded, count, at(kFeatures),
                           shape.feature_stride, hidden(), shape.hidden_stride);
        __syncthreads();
    }

    // Gradients of features, in the place of features.
    SPHEREHEAD_DEVICE void backward_features(int count) const {
        using Tile = MatrixTile<16>;
        for_each_row_tile<16>(count, [&](int first, int rows) {
            for (int column = 0; column < shape.channels_padded; column += Tile::kColumns) {
                Tile tile;
                tile.multiply(hidden() + first * shape.hidden_stride, shape.hidden_stride, rows, shape.hidden,
                              at(kHiddenWeight), shape.channels_padded, column);
#pragma unroll
                for (int r = 0; r < kTileRows; ++r)
                    if (Tile::row(r) < rows)
                        *reinterpret_cast<float2*>(at(kFeatures) + (first + Tile::row(r)) * shape.feature_stride +
                                                   column + Tile::column()) =
                            make_float2(tile.sums[r][0], tile.sums[r][1]);
            }
        });
    }

    // ---- gradients of planes ----

    SPHEREHEAD_DEVICE static bool is_finite(float x) { return absolute(x) <= 3.4028235e38f; }

    // Bits of non-negative floats are ordered like the floats.
    SPHEREHEAD_DEVICE void find_largest(int count) const {
        int largest = 0;
        for_each_thread(count * shape.channels, [&](int item) {
            const int i = item / shape.channels, c = item % shape.channels;
            const float g = absolute(at(kFeatures)[i * shape.feature_stride + c]);
            if (is_finite(g)) largest = max_of(largest, __float_as_int(g));
        });
        for (int distance = kWarpLanes / 2; distance > 0; distance /= 2)
            largest = max_of(largest, __shfl_xor_sync(kAllLanes, largest, distance));
        if (lane_index() == 0) atomicMax(task.largest, largest);
    }

    SPHEREHEAD_DEVICE void add_plane_gradients(std::int64_t scene, int first, int count) const {
        if (shape.dims == 2)
            add_gradients_of<2>(scene, first, count);
        else
            add_gradients_of<3>(scene, first, count);
    }

    template <int kDims>
    SPHEREHEAD_DEVICE void add_gradients_of(std::int64_t scene, int first, int count) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (task.planes == kAddFloats) {
            add_gradients<kDims, float4>(first, count, [&](std::int64_t offset, float weight, float4 g) {
                float* const to = task.plane_gradients + scene * task.field.scene_stride + offset;
                atomicAdd(reinterpret_cast<float4*>(to),
                          make_float4(weight * g.x, weight * g.y, weight * g.z, weight * g.w));
            });
            return;
        }
#endif
        const int exponent = task.planes == kAddFixed ? fixed_point_exponent(*task.largest, task.contribution_bits) : 0;
        add_gradients<kDims, float>(first, count, [&](std::int64_t offset, float weight, float g) {
            const float value = weight * g;
            if (task.planes == kAddFixed && is_finite(value)) {
                const long long fixed = __float2ll_rn(ldexpf(value, exponent));
                atomicAdd(reinterpret_cast<unsigned long long*>(task.fixed_sums + offset),
                          static_cast<unsigned long long>(fixed));
            } else {  // infinities and NaN win in any order
                atomicAdd(task.plane_gradients + scene * task.field.scene_stride + offset, value);
            }
        });
    }

    // Calls add(offset, weight, gradients of adjacent channels) for all neighbours of a tile of points.
    template <int kDims, class Channels, class Add>
    SPHEREHEAD_DEVICE void add_gradients(int first, int count, const Add& add) const {
        constexpr int kChannels = sizeof(Channels) / sizeof(float);
        const int loads = shape.channels / kChannels;
        for_each_thread(count * loads, [&](int item) {
            const int i = item / loads, channel = item % loads * kChannels;
            const Channels g =
                *reinterpret_cast<const Channels*>(at(kFeatures) + (first + i) * shape.feature_stride + channel);
            for (int p = 0; p < shape.planes; ++p) {
                const Corners<kDims> near = corners<kDims>(p, i);
                const std::int64_t plane = p * task.field.plane_stride + channel;
                const float scale = factor(p, first + i);
#pragma unroll
                for (int k = 0; k < Corners<kDims>::kCount; ++k) {
                    const float weight = near.weight(k) * scale;
                    if (weight != 0.0f) add(plane + near.offset(k), weight, g);
                }
            }
        });
    }

    // ---- gradients of positions ----

    // For each plane of each point of a tile: derivatives of (features . their gradients) by the coordinates along the
    // plane's axes, and by its factor. Some adjacent lanes share a point and divide its channels.
    template <int kDims, class Texel>
    SPHEREHEAD_DEVICE void find_slopes(std::int64_t scene, int first, int count) const {
        constexpr int kChannels = kChannelsPerLoad<Texel>, kLanes = 32 / kChannels, kPoints = kThreads / kLanes;
        constexpr int kCount = Corners<kDims>::kCount;
        const int part = thread_index() % kLanes;
        for (int begin = 0; begin < count; begin += kPoints) {
            const int mine = begin + thread_index() / kLanes, i = min_of(mine, count - 1);
            const float* const g = at(kFeatures) + (first + i) * shape.feature_stride;
            for (int p = 0; p < shape.planes; ++p) {
                const Corners<kDims> near = corners<kDims>(p, i);
                const Texel* const plane = plane_of<Texel>(scene, p);
                float products[kCount] = {};  // gradient . texel
                for (int channel = part * kChannels; channel < shape.channels; channel += 32) {
#pragma unroll
                    for (int k = 0; k < kCount; ++k) {
                        float texel[kChannels];
                        load_channels(plane + near.offset(k) + channel, texel);
#pragma unroll
                        for (int c = 0; c < kChannels; ++c) products[k] += g[channel + c] * texel[c];
                    }
                }
                float value = 0.0f;
#pragma unroll
                for (int k = 0; k < kCount; ++k) value += near.weight(k) * products[k];
                put_axis_gradient<kLanes>(p, kDims, i, mine < count, value);
                const float scale = factor(p, first + i);
#pragma unroll
                for (int d = 0; d < kDims; ++d)
                    put_axis_gradient<kLanes>(p, d, i, mine < count,
                                              scale * slope_along<kDims>(near, p, i, d, products));
            }
        }
    }

    template <int kLanes>
    SPHEREHEAD_DEVICE void put_axis_gradient(int plane, int d, int i, bool valid, float part) const {
        const float sum = sum_of_lanes<kLanes>(part);
        if (valid && thread_index() % kLanes == 0)
            axis_gradients()[(plane * (shape.dims + 1) + d) * shape.tile + i] = sum;
    }

    template <int kDims>
    SPHEREHEAD_DEVICE float slope_along(Corners<kDims> near, int plane, int i, int d,
                                        const float (&products)[Corners<kDims>::kCount]) const {
        const float2 slope = slopes()[(plane * kDims + d) * shape.tile + i];
        near.axes[d].low_weight = slope.x, near.axes[d].high_weight = slope.y;
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < Corners<kDims>::kCount; ++k) sum += near.weight(k) * products[k];
        return sum;
    }

    // Replaces positions by their gradients.
    SPHEREHEAD_DEVICE void backward_locate(int first, int count) const {
        with_representation<float>(shape.representation, [&]<class R>() {
            for_each_thread(count, [&](int i) {
                float gc[R::kNumCoordinates] = {}, gw[R::kNumWeights] = {};
#pragma unroll
                for (int p = 0; p < R::kNumPlanes; ++p) {
                    const float* const from = axis_gradients() + p * (R::kDims + 1) * shape.tile + i;
#pragma unroll
                    for (int d = 0; d < R::kDims; ++d) gc[R::axis(p, d)] += from[d * shape.tile];
                    gw[R::group(p)] += from[R::kDims * shape.tile];
                }
                float &x = at(kPointX)[first + i], &y = at(kPointY)[first + i], &z = at(kPointZ)[first + i];
                float gx = 0.0f, gy = 0.0f, gz = 0.0f;
                R::locate_backward(x, y, z, gc, gw, gx, gy, gz);
                x = gx, y = gy, z = gz;
            });
        });
    }

    char *shared_, *global_;
};

}  // namespace spherehead::SPHEREHEAD_ISA
