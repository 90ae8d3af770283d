// One ray on a GPU, from its samples to its colours and back: what a block does between looking points up.
#pragma once

#include "field_cuda.cuh"

namespace spherehead::SPHEREHEAD_ISA {

// Arrays within kRayNumbers, each with `samples` entries. Some are used twice.
enum RayNumber : int {
    kDepth, kSigma,               // by sample: coarse, then fine
    kSortedDepth, kSortedSigma,   // by place along the ray
    kAlpha, kSurvival, kDensity, kTransmittance, kWeight,  // by interval
    kOrder,                       // sample at a place
    kPointOf, kSampleOf,          // point of a sample, -1 where it is cropped; and back
    kNumRayNumbers,
    // While fine samples are drawn:
    kCdf = kSortedDepth, kPdf = kSortedSigma, kBin = kAlpha,
    // In the backward pass:
    kPlaceGradient = kSigma, kBehind = kSigma, kIntervalGradient = kDepth, kDepthGradient = kDensity,
    kMidSigmaGradient = kAlpha, kDeltaGradient = kSurvival,
    // While samples are sorted and placed:
    kKey = kAlpha, kWarpCount = kTransmittance,
};

struct RenderTask {
    FieldTask field;
    Rays rays;
    RenderOutputs outputs;
    RenderGradients gradients;
    int coarse, samples, stride;  // of the arrays in kRayNumbers
    float crop_limit, density_noise;
    std::int64_t first_ray, end_ray;
};

template <bool kAllShared>
class RayBlock : public FieldBlock<kAllShared> {
  public:
    using Base = FieldBlock<kAllShared>;
    using Base::at, Base::hidden, Base::scratch, Base::shape;

    SPHEREHEAD_DEVICE RayBlock(const RenderTask& task, char* shared) : Base(task.field, shared), ray_(task) {}

    SPHEREHEAD_DEVICE void forward(std::int64_t index) const {
        const int points = trace(index);
        write_scalars(index);
        if (shape.activation == kNoActivation)
            composite_hidden(index, points);
        else
            composite_colors(index, points);
        __syncthreads();
    }

    SPHEREHEAD_DEVICE void backward(std::int64_t index) const {
        const int points = trace(index), outputs = shape.outputs;
        const float* const g_features = input(ray_.gradients.features, index, outputs);
        for_each_thread(shape.outputs_padded,
                        [&](int o) { at(kColorGradient)[o] = o < outputs ? g_features[o] : 0.0f; });
        __syncthreads();
        const bool linear = shape.activation == kNoActivation;
        const float of_bias = linear ? backward_composited_hidden(points) : backward_composited_colors(points);
        __syncthreads();
        backward_march(index, of_bias);
        // The gradient of hidden units is an outer product if colours are linear.
        Base::backward(scene_of(index), points, linear ? at(kPointWeight) : at(kTaps), linear ? 1 : shape.color_stride,
                       linear ? at(kQuery) : at(kColorWeight), linear ? 1 : outputs);
        if (Base::task.want_positions && warp_index() == 0) write_ray_gradients(index);
        __syncthreads();
    }

  private:
    SPHEREHEAD_DEVICE float* numbers(RayNumber array) const { return at(kRayNumbers) + array * ray_.stride; }
    SPHEREHEAD_DEVICE int* integers(RayNumber array) const { return reinterpret_cast<int*>(numbers(array)); }
    SPHEREHEAD_DEVICE static const float* input(const void* data, std::int64_t index, std::int64_t width) {
        return data ? static_cast<const float*>(data) + index * width : nullptr;
    }
    SPHEREHEAD_DEVICE static float* output(void* data, std::int64_t index, std::int64_t width) {
        return static_cast<float*>(data) + index * width;
    }
    SPHEREHEAD_DEVICE std::int64_t scene_of(std::int64_t index) const { return index / ray_.rays.rays; }

    // ---- from samples to weights ----

    // Returns the number of points, those samples that are not cropped.
    SPHEREHEAD_DEVICE int trace(std::int64_t index) const {
        const int coarse = ray_.coarse, samples = ray_.samples, fine = samples - coarse;
        const float near_limit = *input(ray_.rays.near_limits, index, 1);
        const float far_limit = *input(ray_.rays.far_limits, index, 1);
        const float* const jitter = input(ray_.rays.coarse_jitter, index, coarse);
        for_each_thread(coarse, [&](int i) {
            const float fraction = coarse_fraction(std::int64_t(i), jitter[i], coarse);
            numbers(kDepth)[i] = coarse_depth(fraction, near_limit, far_limit, ray_.rays.disparity != 0);
        });
        __syncthreads();
        // One body for both passes, because it is large.
        int points = 0;
#pragma unroll 1
        for (int begin = 0, end = coarse;;) {
            const bool is_last = end == samples;
            const float* const noise =
                begin == 0 ? input(ray_.rays.coarse_noise, index, coarse) : input(ray_.rays.fine_noise, index, fine);
            points = evaluate_samples(index, begin, end, points, noise);
            if (is_last) sort(fine > 0);
            march(numbers(is_last ? kSortedDepth : kDepth), numbers(is_last ? kSortedSigma : kSigma), end);
            if (is_last) break;
            draw_fine(input(ray_.rays.importance, index, fine));
            begin = coarse, end = samples;
        }
        for_each_thread(samples, [&](int i) {
            const int point = integers(kPointOf)[integers(kOrder)[i]];
            if (point < 0) return;
            const float* const weights = numbers(kWeight);
            const float before = i > 0 ? weights[i - 1] : 0.0f, after = i + 1 < samples ? weights[i] : 0.0f;
            at(kPointWeight)[point] = (before + after) * 0.5f;
        });
        __syncthreads();
        return points;
    }

    // Raw densities of samples [begin, end); adds those that are not cropped to the points and returns their number.
    SPHEREHEAD_DEVICE int evaluate_samples(std::int64_t index, int begin, int end, int points,
                                           const float* noise) const {
        const int all = place_samples(index, begin, end, points);
        this->evaluate(scene_of(index), points, all);
        for_each_thread(all - points, [&](int i) {
            const int point = points + i, sample = integers(kSampleOf)[point];
            const float added = noise ? noise[sample - begin] * ray_.density_noise : 0.0f;
            numbers(kSigma)[sample] = at(kPointSigma)[point] + added;
        });
        __syncthreads();
        return all;
    }

    SPHEREHEAD_DEVICE int place_samples(std::int64_t index, int begin, int end, int points) const {
        const float* const origin = input(ray_.rays.origins, index, 3);
        const float* const direction = input(ray_.rays.directions, index, 3);
        int* const warp_counts = integers(kWarpCount);
        for (int first = begin; first < end; first += kThreads) {
            const int i = first + thread_index();
            const float t = i < end ? numbers(kDepth)[i] : 0.0f;
            const float x = origin[0] + t * direction[0], z = origin[2] + t * direction[2];
            const bool kept = i < end && is_inside_crop(x, z, ray_.crop_limit);
            const unsigned kept_lanes = __ballot_sync(kAllLanes, kept);
            if (lane_index() == 0) warp_counts[warp_index()] = __popc(kept_lanes);
            __syncthreads();
            int point = points + __popc(kept_lanes & ((1u << lane_index()) - 1));
            for (int w = 0; w < kWarps; ++w) {
                if (w < warp_index()) point += warp_counts[w];
                points += warp_counts[w];
            }
            if (i < end) {
                integers(kPointOf)[i] = kept ? point : -1;
                numbers(kSigma)[i] = float(kRemovedSigma);
            }
            if (kept) {
                integers(kSampleOf)[point] = i;
                at(kPointX)[point] = x * shape.box_scale;
                at(kPointY)[point] = (origin[1] + t * direction[1]) * shape.box_scale;
                at(kPointZ)[point] = z * shape.box_scale;
            }
            __syncthreads();
        }
        return points;
    }

    // Weights of the intervals between `count` ascending samples.
    SPHEREHEAD_DEVICE void march(const float* t, const float* sigma, int count) const {
        for_each_thread(count - 1, [&](int i) {
            const Interval<float> interval = Interval<float>::at((sigma[i] + sigma[i + 1]) * 0.5f, t[i + 1] - t[i]);
            numbers(kAlpha)[i] = interval.alpha;
            numbers(kSurvival)[i] = interval.survival;
            numbers(kDensity)[i] = interval.density;
        });
        __syncthreads();
        if (warp_index() == 0) {
            scan_by_warp<Product>(
                count - 1, [&](int i) { return numbers(kSurvival)[i]; },
                [&](int i, float transmittance) {
                    numbers(kTransmittance)[i] = transmittance;
                    numbers(kWeight)[i] = numbers(kAlpha)[i] * transmittance;
                });
        }
        __syncthreads();
    }

    // Depths of the fine samples, by inverting the cdf of the smoothed coarse weights.
    SPHEREHEAD_DEVICE void draw_fine(const float* uniforms) const {
        const int coarse = ray_.coarse, num_bins = coarse - 3;
        float *const cdf = numbers(kCdf), *const pdf = numbers(kPdf);
        float *const bins = numbers(kBin), *const t = numbers(kDepth);
        for_each_thread(coarse - 1, [&](int i) { bins[i] = (t[i] + t[i + 1]) * 0.5f; });
        if (warp_index() == 0) {
            for (int k = lane_index(); k < num_bins; k += kWarpLanes)
                pdf[k] =
                    smoothed_weight(numbers(kWeight), std::int64_t(k + 1), std::int64_t(coarse - 1)) + float(kPdfEps);
            // Here and in the scan a lane reads what it wrote itself.
            const float sum = sum_by_warp(num_bins, [&](int k) { return pdf[k]; });
            const float total = scan_by_warp<Sum>(
                num_bins, [&](int k) { return pdf[k] / sum; }, [&](int k, float before) { cdf[k] = before; });
            if (lane_index() == 0) cdf[num_bins] = total;
        }
        __syncthreads();
        for_each_thread(ray_.samples - coarse, [&](int j) {
            const float u = uniforms[j];
            int above = 0;  // entries of the cdf up to u
            for (int k = 0; k <= num_bins; ++k) above += cdf[k] <= u;
            const int low = max_of(above - 1, 0), high = min_of(above, num_bins);
            t[coarse + j] = invert_cdf_bin(u, cdf[low], cdf[high], bins[low], bins[high]);
        });
        __syncthreads();
    }

    // Merges all samples: a stable sort, by counting how many come before each; two lanes count for one. NaN comes
    // last.
    SPHEREHEAD_DEVICE void sort(bool merge) const {
        const int samples = ray_.samples;
        const float* const t = numbers(kDepth);
        float* const key = numbers(kKey);
        for_each_thread(samples, [&](int i) { key[i] = t[i] == t[i] ? t[i] : __int_as_float(0x7f800000); });
        __syncthreads();
        for (int first = 0; first < 2 * samples; first += kThreads) {
            const int i = (first + thread_index()) / 2, part = thread_index() % 2;
            int place = merge || part == 1 ? 0 : i;
            if (merge && i < samples) {
                const float mine = key[i];
                for (int j = part; j < samples; j += 2) place += (key[j] < mine) | ((key[j] == mine) & (j < i));
            }
            place += __shfl_xor_sync(kAllLanes, place, 1);
            if (i >= samples || part == 1) continue;
            integers(kOrder)[place] = i;
            numbers(kSortedDepth)[place] = t[i];
            numbers(kSortedSigma)[place] = numbers(kSigma)[i];
        }
        __syncthreads();
    }

    // ---- forward ----

    SPHEREHEAD_DEVICE float middle(int i) const {
        return (numbers(kSortedDepth)[i] + numbers(kSortedDepth)[i + 1]) * 0.5f;
    }
    // The sum of the weights of intervals, and also of samples, to which intervals are halved. By every warp.
    SPHEREHEAD_DEVICE float accumulation() const {
        return sum_by_warp(ray_.samples - 1, [&](int i) { return numbers(kWeight)[i]; });
    }
    SPHEREHEAD_DEVICE float weighted_depth() const {
        return sum_by_warp(ray_.samples - 1, [&](int i) { return numbers(kWeight)[i] * middle(i); });
    }
    SPHEREHEAD_DEVICE void write_scalars(std::int64_t index) const {
        if (warp_index() != 0) return;
        const float total = accumulation(), depth = weighted_depth();
        if (lane_index() != 0) return;
        *output(ray_.outputs.accumulation, index, 1) = total;
        *output(ray_.outputs.depth, index, 1) = total > 0.0f ? depth / total : 0.0f;
        float* const range = output(ray_.outputs.depth_range, index, 2);
        range[0] = numbers(kSortedDepth)[0], range[1] = numbers(kSortedDepth)[ray_.samples - 1];
    }

    // The sum of hidden units, weighted, into kComposited.
    SPHEREHEAD_DEVICE void sum_hidden(int points) const {
        const float* const weights = at(kPointWeight);
        sum_columns(
            shape.hidden_padded, points, scratch(),
            [&](int i, int u) {
                return weights[i] != 0.0f ? weights[i] * hidden()[i * shape.hidden_stride + u] : 0.0f;
            },
            [&](int u, float sum) { at(kComposited)[u] = sum; });
    }

    // Without an activation, the colour layer is linear: it is applied once, to the composited hidden units.
    SPHEREHEAD_DEVICE void composite_hidden(std::int64_t index, int points) const {
        sum_hidden(points);
        const float total = accumulation();
        float* const out = output(ray_.outputs.features, index, shape.outputs);
        sum_columns(
            shape.outputs_padded, shape.hidden, scratch(),
            [&](int u, int o) { return at(kComposited)[u] * at(kColorWeightT)[u * shape.outputs_padded + o]; },
            [&](int o, float sum) {
                if (o < shape.outputs) out[o] = sum + total * at(kColorBias)[o];
            });
    }

    SPHEREHEAD_DEVICE void composite_colors(std::int64_t index, int points) const {
        using Tile = typename Base::ColorTile;
        float* const of_warps = at(kTaps);  // [kWarps, O'], by group of lanes
        const int width = shape.outputs_padded;
        for_each_thread(kWarps * width, [&](int i) { of_warps[i] = 0.0f; });
        __syncthreads();
        this->linear_colors(points, [&](int first, int rows, int column, const Tile& tile) {
            float sums[kTileColumns] = {};
#pragma unroll
            for (int r = 0; r < kTileRows; ++r) {
                if (Tile::row(r) >= rows) continue;
                const float weight = at(kPointWeight)[first + Tile::row(r)];
                if (weight == 0.0f) continue;
#pragma unroll
                for (int v = 0; v < kTileColumns; ++v) sums[v] += weight * activate(tile.sums[r][v], shape.activation);
            }
#pragma unroll
            for (int v = 0; v < kTileColumns; ++v) {
                sums[v] += __shfl_xor_sync(kAllLanes, sums[v], kWarpLanes / 2);  // the other group
                if (lane_index() < kWarpLanes / 2)
                    of_warps[warp_index() * width + column + Tile::column() + v] += sums[v];
            }
        });
        __syncthreads();
        float* const out = output(ray_.outputs.features, index, shape.outputs);
        for_each_thread(shape.outputs, [&](int o) {
            float sum = 0.0f;
            for (int w = 0; w < kWarps; ++w) sum += of_warps[w * width + o];
            out[o] = sum;
        });
    }

    // ---- backward ----

    // From the gradient of colours to those of point weights (into kPointGradient), and kQuery, whose product with the
    // weight of a point is the gradient of its hidden units. Returns what every sample's weight gets from the bias.
    SPHEREHEAD_DEVICE float backward_composited_hidden(int points) const {
        const float* const gradient = at(kColorGradient);
        const int width = shape.hidden_padded;
        sum_columns(
            width, shape.outputs, scratch(),
            [&](int o, int u) { return gradient[o] * at(kColorWeight)[o * width + u]; },
            [&](int u, float sum) { at(kQuery)[u] = sum; });
        for (int i = warp_index(); i < points; i += kWarps) {
            const float* const h = hidden() + i * shape.hidden_stride;
            const float product = sum_by_warp(width, [&](int u) { return h[u] * at(kQuery)[u]; });
            if (lane_index() == 0) at(kPointGradient)[i] = product;
        }
        if (Base::task.want_sums) {
            const DecoderSums sums = DecoderSums::of(shape);
            sum_hidden(points);
            add_outer_products(at(kSums) + sums.color_weight, shape.outputs_padded, width, 1, gradient, 0,
                               at(kComposited), 0);
            const float total = accumulation();
            for_each_thread(shape.outputs_padded,
                            [&](int o) { at(kSums)[sums.color_bias + o] += gradient[o] * total; });
        }
        return sum_by_warp(shape.outputs, [&](int o) { return gradient[o] * at(kColorBias)[o]; });
    }

    // Likewise, with the gradients of colours before their activation into kTaps.
    SPHEREHEAD_DEVICE float backward_composited_colors(int points) const {
        using Tile = typename Base::ColorTile;
        float* const g_linear = at(kTaps);
        const float* const gradient = at(kColorGradient);
        float of_weight[kTileRows];
        this->linear_colors(points, [&](int first, int rows, int column, const Tile& tile) {
#pragma unroll
            for (int r = 0; r < kTileRows; ++r) {
                if (column == 0) of_weight[r] = 0.0f;
                if (Tile::row(r) >= rows) continue;
                const int point = first + Tile::row(r);
#pragma unroll
                for (int v = 0; v < kTileColumns; ++v) {
                    const int o = column + Tile::column() + v;
                    const float linear = tile.sums[r][v];
                    of_weight[r] += gradient[o] * activate(linear, shape.activation);
                    g_linear[point * shape.color_stride + o] =
                        gradient[o] * at(kPointWeight)[point] * activation_slope(linear, shape.activation);
                }
            }
            if (column + Tile::kColumns < shape.outputs_padded) return;
#pragma unroll
            for (int r = 0; r < kTileRows; ++r) {
                const float sum = sum_of_lanes<kWarpLanes / Tile::kGroups>(of_weight[r]);
                if (Tile::row(r) < rows && Tile::column() == 0) at(kPointGradient)[first + Tile::row(r)] = sum;
            }
        });
        __syncthreads();
        if (Base::task.want_sums) this->add_color_sums(points);
        return 0.0f;
    }

    // From gradients of point weights to those of densities (kPointGradient) and depths (kDepthGradient, by place).
    SPHEREHEAD_DEVICE void backward_march(std::int64_t index, float of_bias) const {
        const int samples = ray_.samples, intervals = samples - 1;
        const float g_depth = *input(ray_.gradients.depth, index, 1);
        const float g_accumulation = *input(ray_.gradients.accumulation, index, 1);
        for_each_thread(samples, [&](int i) {
            const int point = integers(kPointOf)[integers(kOrder)[i]];
            numbers(kPlaceGradient)[i] = of_bias + (point >= 0 ? at(kPointGradient)[point] : 0.0f);
        });
        const float total = accumulation(), inverse = total > 0.0f ? 1.0f / total : 0.0f;
        const float depth = weighted_depth() * inverse;
        __syncthreads();
        for_each_thread(intervals, [&](int i) {
            const float* const of_place = numbers(kPlaceGradient);
            numbers(kIntervalGradient)[i] =
                (of_place[i] + of_place[i + 1]) * 0.5f + g_accumulation + g_depth * (middle(i) - depth) * inverse;
        });
        __syncthreads();
        if (warp_index() == 0) {  // sums over the intervals behind each
            const auto from_behind = [&](int k) { return intervals - 1 - k; };
            scan_by_warp<Sum>(
                intervals,
                [&](int k) { return numbers(kIntervalGradient)[from_behind(k)] * numbers(kWeight)[from_behind(k)]; },
                [&](int k, float sum) { numbers(kBehind)[from_behind(k)] = sum; });
        }
        __syncthreads();
        for_each_thread(intervals, [&](int i) {
            const Interval<float> interval{numbers(kAlpha)[i], numbers(kSurvival)[i], numbers(kDensity)[i]};
            const float delta = numbers(kSortedDepth)[i + 1] - numbers(kSortedDepth)[i];
            const float g_alpha =
                numbers(kIntervalGradient)[i] * numbers(kTransmittance)[i] - numbers(kBehind)[i] / interval.survival;
            numbers(kMidSigmaGradient)[i] = g_alpha * interval.sigma_slope(delta) * 0.5f;
            numbers(kDeltaGradient)[i] = g_alpha * interval.delta_slope();
        });
        __syncthreads();
        for_each_thread(samples, [&](int i) {
            float g_sigma = 0.0f, g_t = 0.0f;
            const auto add = [&](int interval, float sign) {
                g_sigma += numbers(kMidSigmaGradient)[interval];
                g_t += sign * numbers(kDeltaGradient)[interval] + g_depth * numbers(kWeight)[interval] * inverse * 0.5f;
            };
            if (i > 0) add(i - 1, 1.0f);
            if (i < intervals) add(i, -1.0f);
            numbers(kDepthGradient)[i] = g_t;
            const int point = integers(kPointOf)[integers(kOrder)[i]];
            if (point >= 0) at(kPointGradient)[point] = g_sigma;
        });
        __syncthreads();
    }

    // By one warp, from gradients of depths and of positions.
    SPHEREHEAD_DEVICE void write_ray_gradients(std::int64_t index) const {
        const float* const direction = input(ray_.rays.directions, index, 3);
        const float* const jitter = input(ray_.rays.coarse_jitter, index, ray_.coarse);
        float g_origin[3] = {}, g_direction[3] = {}, g_near = 0.0f, g_far = 0.0f;
        for (int i = lane_index(); i < ray_.samples; i += kWarpLanes) {
            const int sample = integers(kOrder)[i], point = integers(kPointOf)[sample];
            const float t = numbers(kSortedDepth)[i];
            float g_t = numbers(kDepthGradient)[i];
            if (point >= 0) {
                const float g_position[3] = {at(kPointX)[point] * shape.box_scale, at(kPointY)[point] * shape.box_scale,
                                             at(kPointZ)[point] * shape.box_scale};
#pragma unroll
                for (int k = 0; k < 3; ++k) {
                    g_origin[k] += g_position[k];
                    g_direction[k] += t * g_position[k];
                    g_t += g_position[k] * direction[k];
                }
            }
            if (sample >= ray_.coarse) continue;  // depths of fine samples are constants
            const float fraction = coarse_fraction(std::int64_t(sample), jitter[sample], ray_.coarse);
            g_near += g_t * (1.0f - fraction), g_far += g_t * fraction;
        }
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            const float of_origin = sum_of_lanes(g_origin[k]), of_direction = sum_of_lanes(g_direction[k]);
            if (lane_index() != 0) continue;
            output(ray_.gradients.origins, index, 3)[k] = of_origin;
            output(ray_.gradients.directions, index, 3)[k] = of_direction;
        }
        const float near_sum = sum_of_lanes(g_near), far_sum = sum_of_lanes(g_far);
        if (lane_index() != 0) return;
        *output(ray_.gradients.near_limits, index, 1) = near_sum;
        *output(ray_.gradients.far_limits, index, 1) = far_sum;
    }

    const RenderTask& ray_;
};

}  // namespace spherehead::SPHEREHEAD_ISA
