// One ray on a CPU: samples, their densities, and the weights of marching; and marching backward.
#pragma once

#include "field_cpu.h"

namespace spherehead::SPHEREHEAD_ISA {

// One ray on its way through the field.
template <class T, class Representation>
class RayTrace {
  public:
    using Batch = PointBatch<T, Representation>;

    static std::int64_t bytes(const Rays& rays, const Decoder<T>& d) {
        const std::int64_t samples = rays.coarse + rays.fine;
        return Batch::bytes(samples, d) + 14 * Arena::bytes_of<T>(samples + 1) +
               3 * Arena::bytes_of<std::int32_t>(samples);
    }

    RayTrace(const Rays& rays, const Decoder<T>& d, Arena& arena)
        : batch(rays.coarse + rays.fine, d, arena), rays_(rays), samples_(rays.coarse + rays.fine) {
        const auto numbers = [&] { return arena.template take<T>(samples_ + 1); };
        t_ = numbers(), sigma_ = numbers(), sorted_t = numbers(), sorted_sigma_ = numbers();
        alpha_ = numbers(), survival_ = numbers(), density_ = numbers(), transmittance_ = numbers(), weights = numbers();
        sample_weights = numbers(), x_ = numbers(), z_ = numbers(), uniform_weights_ = numbers(), bins_ = numbers();
        order = arena.template take<std::int32_t>(samples_);
        point_of = arena.template take<std::int32_t>(samples_);
        sample_of = arena.template take<std::int32_t>(samples_);
    }

    // Traces ray `index` of all B R rays, up to the weights of intervals and samples.
    void run(const FieldOfScene<T, Representation>& field, double box_scale, std::int64_t index) {
        const std::int64_t coarse = rays_.coarse, fine = rays_.fine;
        origin = row<T>(rays_.origins, index, 3), direction = row<T>(rays_.directions, index, 3);
        batch.count = 0;
        const T near_limit = *row<T>(rays_.near_limits, index, 1), far_limit = *row<T>(rays_.far_limits, index, 1);
        const T* const jitter = row<T>(rays_.coarse_jitter, index, coarse);
        for (std::int64_t i = 0; i < coarse; ++i)
            t_[i] = coarse_depth(coarse_fraction(i, jitter[i], coarse), near_limit, far_limit, rays_.disparity != 0);
        evaluate(field, box_scale, 0, coarse, row<T>(rays_.coarse_noise, index, coarse));
        if (fine > 0) {
            march(t_, sigma_, coarse);
            sample_fine(row<T>(rays_.importance, index, fine));
            evaluate(field, box_scale, coarse, samples_, row<T>(rays_.fine_noise, index, fine));
        }
        sort();
        march(sorted_t, sorted_sigma_, samples_);
        for (std::int64_t i = 0; i < samples_; ++i)
            sample_weights[i] = ((i > 0 ? weights[i - 1] : T(0)) + (i + 1 < samples_ ? weights[i] : T(0))) * T(0.5);
    }

    // What the intervals sum up to; the depth is 0 without opacity.
    struct Integral {
        T accumulation, depth;
    };
    Integral integrate() const {
        Integral sum{0, 0};
        for (std::int64_t i = 0; i < samples_ - 1; ++i) {
            sum.accumulation += weights[i];
            sum.depth += weights[i] * (sorted_t[i] + sorted_t[i + 1]) * T(0.5);
        }
        sum.depth = sum.accumulation > T(0) ? sum.depth / sum.accumulation : T(0);
        return sum;
    }

    // From gradients of weights of intervals to those of raw densities, by sorted sample, and of depths (added to
    // g_depth).
    void backward_march(const T* g_weights, T* g_sigma, T* g_depth) const {
        std::fill(g_sigma, g_sigma + samples_, T(0));
        T behind = 0;  // sum of g_weights * weights over the intervals behind this one
        for (std::int64_t i = samples_ - 2; i >= 0; --i) {
            const Interval<T> interval{alpha_[i], survival_[i], density_[i]};
            const T delta = sorted_t[i + 1] - sorted_t[i];
            const T g_alpha = g_weights[i] * transmittance_[i] - behind / interval.survival;
            behind += g_weights[i] * weights[i];
            const T g_mid = g_alpha * interval.sigma_slope(delta) * T(0.5), g_delta = g_alpha * interval.delta_slope();
            g_sigma[i] += g_mid, g_sigma[i + 1] += g_mid;
            g_depth[i] -= g_delta, g_depth[i + 1] += g_delta;
        }
    }

    Batch batch;                    // the samples that are not cropped
    const T *origin, *direction;
    T *sorted_t, *weights, *sample_weights;  // [S + F], [S + F - 1], [S + F], in the order along the ray
    std::int32_t* order;            // sample at a place along the ray
    std::int32_t* point_of;         // point in the batch of a sample; -1: cropped
    std::int32_t* sample_of;        // and back

  private:
    // Raw densities of samples [begin, end).
    void evaluate(const FieldOfScene<T, Representation>& field, double box_scale, std::int64_t begin, std::int64_t end,
                  const T* noise) {
        const T limit = T(rays_.crop_limit), scale = T(box_scale);
        SPHEREHEAD_SIMD
        for (std::int64_t i = begin; i < end; ++i) {
            x_[i] = origin[0] + t_[i] * direction[0];
            z_[i] = origin[2] + t_[i] * direction[2];
        }
        const std::int64_t first = batch.count;
        for (std::int64_t i = begin; i < end; ++i) {
            const bool kept = is_inside_crop(x_[i], z_[i], limit);
            point_of[i] = kept ? std::int32_t(batch.count) : -1;
            sigma_[i] = T(kRemovedSigma);
            if (!kept) continue;
            const std::int64_t point = batch.count++;
            sample_of[point] = std::int32_t(i);
            batch.x[point] = x_[i] * scale;
            batch.y[point] = (origin[1] + t_[i] * direction[1]) * scale;
            batch.z[point] = z_[i] * scale;
        }
        field.evaluate(batch, first);
        for (std::int64_t point = first; point < batch.count; ++point) {
            const std::int64_t i = sample_of[point];
            sigma_[i] = batch.sigma[point] + (noise ? noise[i - begin] * T(rays_.density_noise) : T(0));
        }
    }

    // Weights of the intervals between `count` ascending samples.
    void march(const T* t, const T* sigma, std::int64_t count) {
        SPHEREHEAD_SIMD
        for (std::int64_t i = 0; i < count - 1; ++i) {
            const Interval<T> interval = Interval<T>::at((sigma[i] + sigma[i + 1]) * T(0.5), t[i + 1] - t[i]);
            alpha_[i] = interval.alpha, survival_[i] = interval.survival, density_[i] = interval.density;
        }
        T transmittance = 1;
        for (std::int64_t i = 0; i < count - 1; ++i) {
            transmittance_[i] = transmittance;
            weights[i] = alpha_[i] * transmittance;
            transmittance *= survival_[i];
        }
    }

    // Depths of the fine samples, by inverting the cdf of the smoothed coarse weights.
    void sample_fine(const T* uniforms) {
        const std::int64_t coarse = rays_.coarse;
        const auto num_bins = std::int32_t(coarse - 3);
        SPHEREHEAD_SIMD
        for (std::int64_t i = 0; i < coarse - 1; ++i) bins_[i] = (t_[i] + t_[i + 1]) * T(0.5);
        double sum = 0;
        for (std::int64_t k = 0; k < num_bins; ++k) {
            uniform_weights_[k] = smoothed_weight(weights, k + 1, coarse - 1) + T(kPdfEps);
            sum += uniform_weights_[k];
        }
        double total = 0;
        T* const cdf = x_;  // free until the fine samples are evaluated
        for (std::int64_t k = 0; k < num_bins; ++k) {
            cdf[k] = T(total);
            total += uniform_weights_[k] / sum;
        }
        cdf[num_bins] = T(total);
        for (std::int64_t j = 0; j < rays_.fine; ++j) {
            const T u = uniforms[j];
            std::int32_t above = 0;  // entries of the cdf up to u; counting them is quicker than a binary search
            for (std::int32_t k = 0; k <= num_bins; ++k) above += cdf[k] <= u;
            const std::int32_t low = std::max(above - 1, 0), high = std::min(above, num_bins);
            t_[coarse + j] = invert_cdf_bin(u, cdf[low], cdf[high], bins_[low], bins_[high]);
        }
    }

    // Merges coarse and fine samples: a stable sort, by counting how many come before each.
    void sort() {
        const auto samples = std::int32_t(samples_);
        for (std::int32_t i = 0; i < samples; ++i) order[i] = i;
        for (std::int32_t i = 0; rays_.fine > 0 && i < samples; ++i) {
            const T t = t_[i];
            std::int32_t place = 0;
            for (std::int32_t j = 0; j < samples; ++j) place += (t_[j] < t) | ((t_[j] == t) & (j < i));
            order[place] = i;
        }
        for (std::int64_t i = 0; i < samples_; ++i) {
            sorted_t[i] = t_[order[i]];
            sorted_sigma_[i] = sigma_[order[i]];
        }
    }

    const Rays& rays_;
    std::int64_t samples_;
    T *t_, *sigma_;  // by sample: coarse, then fine
    T* sorted_sigma_;
    T *alpha_, *survival_, *density_, *transmittance_;  // of the intervals of the last march
    T *x_, *z_, *uniform_weights_, *bins_;
};

}  // namespace spherehead::SPHEREHEAD_ISA
