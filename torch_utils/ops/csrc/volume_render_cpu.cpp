// Volume rendering and field queries on a CPU.
//
// A ray is traced from beginning to end in memory that stays in the cache: coarse samples, importance samples, marching,
// compositing. The backward pass traces it again. Gradients of planes are not added where they arise: those of a chunk
// of rays are kept, and then every part of the planes is owned by one task, which adds them in the order of samples. The
// result is therefore the same for every number of threads.
#include "field_cpu.h"

#include <limits>
#include <vector>

namespace spherehead::SPHEREHEAD_ISA {
namespace {

constexpr std::int64_t kRaysPerTask = 16, kPointsPerTask = 1536;

template <class T>
const T* row(const void* data, std::int64_t index, std::int64_t width) {
    return data ? static_cast<const T*>(data) + index * width : nullptr;
}
template <class T>
T* row(void* data, std::int64_t index, std::int64_t width) {
    return data ? static_cast<T*>(data) + index * width : nullptr;
}

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

    // From gradients of weights of intervals and samples to those of raw densities, by sorted sample, and of depths
    // (added to g_depth). `scratch` has room for the samples.
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
        const std::int64_t coarse = rays_.coarse, num_bins = coarse - 3;
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
            std::int64_t above = 0;  // entries of the cdf up to u; counting them is quicker than a binary search
            for (std::int64_t k = 0; k <= num_bins; ++k) above += cdf[k] <= u;
            const std::int64_t low = std::max<std::int64_t>(above - 1, 0), high = std::min(above, num_bins);
            t_[coarse + j] = invert_cdf_bin(u, cdf[low], cdf[high], bins_[low], bins_[high]);
        }
    }

    // Merges coarse and fine samples: a stable sort, by counting how many come before each.
    void sort() {
        for (std::int64_t i = 0; i < samples_; ++i) order[i] = std::int32_t(i);
        for (std::int64_t i = 0; rays_.fine > 0 && i < samples_; ++i) {
            const T t = t_[i];
            std::int32_t place = 0;
            for (std::int64_t j = 0; j < i; ++j) place += t_[j] <= t;
            for (std::int64_t j = i; j < samples_; ++j) place += t_[j] < t;
            order[place] = std::int32_t(i);
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

// ---- forward ----

template <class T, class Representation>
void render_ray(const Field& field, const FieldOfScene<T, Representation>& scene, const Decoder<T>& d, const Rays& rays,
                const RenderOutputs& outputs, std::int64_t index, RayTrace<T, Representation>& trace, T* scratch) {
    trace.run(scene, field.box_scale, index);
    const std::int64_t samples = rays.coarse + rays.fine;
    T accumulation = 0, depth = 0;
    for (std::int64_t i = 0; i < samples - 1; ++i) {
        accumulation += trace.weights[i];
        depth += trace.weights[i] * (trace.sorted_t[i] + trace.sorted_t[i + 1]) * T(0.5);
    }
    *row<T>(outputs.accumulation, index, 1) = accumulation;
    *row<T>(outputs.depth, index, 1) = accumulation > T(0) ? depth / accumulation : T(0);
    T* const range = row<T>(outputs.depth_range, index, 2);
    range[0] = trace.sorted_t[0], range[1] = trace.sorted_t[samples - 1];

    T* const out = row<T>(outputs.features, index, field.outputs);
    if (field.activation == kNoActivation) {
        // The colour layer is linear: it is applied once, to the composited hidden units.
        T *const hidden = scratch, *const color = scratch + d.hidden_padded;
        std::fill(hidden, hidden + d.hidden_padded, T(0));
        T total = 0;
        for (std::int64_t i = 0; i < samples; ++i) {
            total += trace.sample_weights[i];
            const std::int32_t point = trace.point_of[trace.order[i]];
            if (point >= 0 && trace.sample_weights[i] != T(0))
                add_scaled(hidden, trace.sample_weights[i], trace.batch.hidden + point * d.hidden_padded, d.hidden_padded);
        }
        for (std::int64_t o = 0; o < d.outputs_padded; ++o) color[o] = total * d.color_bias[o];
        multiply<T>(1, d.outputs_padded, d.hidden, {hidden, 0, 1}, d.color_weight_t, d.outputs_padded, nullptr, true, color,
                    d.outputs_padded);
        std::copy(color, color + field.outputs, out);
        return;
    }
    T *const colors = scratch, *const sum = scratch + samples * d.outputs_padded;
    scene.linear_colors(trace.batch, colors);
    std::fill(sum, sum + d.outputs_padded, T(0));
    for (std::int64_t i = 0; i < samples; ++i) {
        const std::int32_t point = trace.point_of[trace.order[i]];
        if (point < 0 || trace.sample_weights[i] == T(0)) continue;
        T* const color = colors + point * d.outputs_padded;
        SPHEREHEAD_SIMD
        for (std::int64_t o = 0; o < d.outputs_padded; ++o) color[o] = activate(color[o], field.activation);
        add_scaled(sum, trace.sample_weights[i], color, d.outputs_padded);
    }
    std::copy(sum, sum + field.outputs, out);
}

template <class T, class Representation>
void render(const Field& field, const Rays& rays, const RenderOutputs& outputs) {
    const Decoder<T> d(field);
    const std::int64_t samples = rays.coarse + rays.fine;
    const std::int64_t tasks_per_scene = (rays.rays + kRaysPerTask - 1) / kRaysPerTask;
    const std::int64_t scratch = d.hidden_padded + (samples + 1) * d.outputs_padded;
    parallel_for(field.scenes * tasks_per_scene, [&](std::int64_t task) {
        const std::int64_t scene = task / tasks_per_scene, begin = task % tasks_per_scene * kRaysPerTask;
        Arena arena(RayTrace<T, Representation>::bytes(rays, d) + Arena::bytes_of<T>(scratch));
        RayTrace<T, Representation> trace(rays, d, arena);
        T* const memory = arena.template take<T>(scratch);
        const FieldOfScene<T, Representation> of_scene(field, d, scene);
        for (std::int64_t r = begin; r < std::min(begin + kRaysPerTask, rays.rays); ++r)
            render_ray(field, of_scene, d, rays, outputs, scene * rays.rays + r, trace, memory);
    });
}

template <class T, class Representation>
void query(const Field& field, const Points& points, void* out_sigma, void* out_features) {
    const Decoder<T> d(field);
    const std::int64_t tasks_per_scene = (points.count + kPointsPerTask - 1) / kPointsPerTask;
    constexpr std::int64_t kBatch = 96;
    parallel_for(field.scenes * tasks_per_scene, [&](std::int64_t task) {
        using Batch = PointBatch<T, Representation>;
        const std::int64_t scene = task / tasks_per_scene, begin = task % tasks_per_scene * kPointsPerTask;
        const std::int64_t end = std::min(begin + kPointsPerTask, points.count);
        Arena arena(Batch::bytes(kBatch, d) + Arena::bytes_of<T>(kBatch * d.outputs_padded));
        Batch batch(kBatch, d, arena);
        T* const colors = arena.template take<T>(kBatch * d.outputs_padded);
        const FieldOfScene<T, Representation> of_scene(field, d, scene);
        for (std::int64_t first = begin; first < end; first += kBatch) {
            batch.count = std::min(kBatch, end - first);
            const std::int64_t index = scene * points.count + first;
            const T *const from = row<T>(points.points, index, 3), *const noise = row<T>(points.noise, index, 1);
            for (std::int64_t i = 0; i < batch.count; ++i) {
                batch.x[i] = from[3 * i] * T(field.box_scale);
                batch.y[i] = from[3 * i + 1] * T(field.box_scale);
                batch.z[i] = from[3 * i + 2] * T(field.box_scale);
            }
            of_scene.evaluate(batch);
            T* const sigma = row<T>(out_sigma, index, 1);
            for (std::int64_t i = 0; i < batch.count; ++i)
                sigma[i] = batch.sigma[i] + (noise ? noise[i] * T(points.density_noise) : T(0));
            if (out_features == nullptr) continue;
            of_scene.linear_colors(batch, colors);
            for (std::int64_t i = 0; i < batch.count; ++i) {
                T *const to = row<T>(out_features, index + i, field.outputs), *const color = colors + i * d.outputs_padded;
                SPHEREHEAD_SIMD
                for (std::int64_t o = 0; o < field.outputs; ++o) to[o] = activate(color[o], field.activation);
            }
        }
    });
}

// ---- backward ----

// What tasks leave for the gradients of planes: gradients of features, and where their points are.
template <class T, class Representation>
class Scatter {
  public:
    Scatter(const Field& field, const Decoder<T>& d, std::int64_t slots, std::int64_t capacity)
        : field_(field), d_(d), slots_(slots), capacity_(capacity), counts_(slots),
          arena_(Arena::bytes_of<T>(slots * capacity * row_size())) {
        memory_ = arena_.template take<T>(slots * capacity * row_size());
    }

    // Gradients of features [capacity, C'] of a slot, for a task to write.
    T* features(std::int64_t slot) { return memory_ + slot * capacity_ * row_size(); }

    void keep(std::int64_t slot, const PointBatch<T, Representation>& batch) {
        counts_[slot] = batch.count;
        T* to = features(slot) + capacity_ * d_.channels_padded;
        to = std::copy(batch.coordinates, batch.coordinates + Representation::kNumCoordinates * capacity_, to);
        std::copy(batch.weights, batch.weights + Representation::kNumWeights * capacity_, to);
    }

    // Adds the first `slots` of them to the planes of a scene.
    void add_to(T* g_planes, std::int64_t scene, std::int64_t slots) {
        const FieldOfScene<T, Representation> of_scene(field_, d_, scene);
        T* const planes = g_planes + scene * field_.scene_stride;
        const std::int64_t bands = std::min<std::int64_t>(kBands, field_.height);
        parallel_for(Representation::kNumPlanes * bands, [&](std::int64_t task) {
            const std::int64_t plane = task / bands, band = task % bands;
            for (std::int64_t slot = 0; slot < slots; ++slot) {
                const T* const where = features(slot) + capacity_ * d_.channels_padded;
                of_scene.scatter(planes, int(plane), band * field_.height / bands, (band + 1) * field_.height / bands,
                                 counts_[slot], capacity_, where, where + Representation::kNumCoordinates * capacity_,
                                 features(slot));
            }
        });
    }

  private:
    static constexpr std::int64_t kBands = 2;
    std::int64_t row_size() const {
        return d_.channels_padded + Representation::kNumCoordinates + Representation::kNumWeights;
    }

    const Field& field_;
    const Decoder<T>& d_;
    std::int64_t slots_, capacity_;
    std::vector<std::int64_t> counts_;
    Arena arena_;
    T* memory_;
};

// Runs `count` units of work on a scene, in chunks whose feature gradients fit in the cache: task(unit_begin, unit_end,
// first_slot, sums, scatter) is called for runs of units; then planes and decoder receive what it left.
template <class T, class Representation, class Task>
void backward_in_chunks(const Field& field, const Decoder<T>& d, const FieldGradients& gradients, std::int64_t count,
                        std::int64_t units_per_task, std::int64_t points_per_unit, const Task& task) {
    constexpr std::int64_t kTasksPerChunk = 16;
    const std::int64_t units_per_chunk = std::min(count, kTasksPerChunk * units_per_task);
    const std::int64_t sums_size = DecoderGradients<T>::size(d);
    Scatter<T, Representation> scatter(field, d, units_per_chunk, points_per_unit);
    std::vector<T> sums(kTasksPerChunk * sums_size);
    for (std::int64_t scene = 0; scene < field.scenes; ++scene) {
        for (std::int64_t chunk = 0; chunk < count; chunk += units_per_chunk) {
            const std::int64_t units = std::min(units_per_chunk, count - chunk);
            const std::int64_t tasks = (units + units_per_task - 1) / units_per_task;
            std::fill(sums.begin(), sums.end(), T(0));
            parallel_for(tasks, [&](std::int64_t i) {
                const std::int64_t begin = i * units_per_task, end = std::min(begin + units_per_task, units);
                task(scene, chunk + begin, chunk + end, begin, DecoderGradients<T>::in(&sums[i * sums_size], d), scatter);
            });
            if (gradients.planes != nullptr) scatter.add_to(static_cast<T*>(gradients.planes), scene, units);
            if (gradients.hidden_weight == nullptr) continue;
            for (std::int64_t i = 0; i < tasks; ++i) DecoderGradients<T>::in(&sums[i * sums_size], d).add_to(gradients, d);
        }
    }
}

// The colour layer backward, for gradients of activated colours [count, O'] (overwritten by those before activation):
// adds to the gradients of hidden units [count, U'] and to the layer's own.
template <class T>
void backward_colors(const Decoder<T>& d, const T* hidden, std::int64_t count, const T* g_linear, T* g_hidden,
                     DecoderGradients<T>& sums) {
    multiply<T>(count, d.hidden_padded, d.outputs, {g_linear, d.outputs_padded, 1}, d.color_weight, d.hidden_padded,
                nullptr, false, g_hidden, d.hidden_padded);
    multiply<T>(d.outputs, d.hidden_padded, count, {g_linear, 1, d.outputs_padded}, hidden, d.hidden_padded, nullptr, true,
                sums.color_weight, d.hidden_padded);
    for (std::int64_t i = 0; i < count; ++i) add_scaled(sums.color_bias, T(1), g_linear + i * d.outputs_padded, d.outputs_padded);
}

// Scratch of the backward pass of a ray.
template <class T>
struct RayGradients {
    T *weights, *sorted_sigma, *sorted_t;  // by place along the ray
    T* sigma;                              // by point
    T *x, *y, *z;
    T *hidden, *colors;                    // [points, U'], [points, O']
    T *composited, *q;                     // [U']

    static std::int64_t bytes(std::int64_t samples, const Decoder<T>& d) {
        return 7 * Arena::bytes_of<T>(samples) + Arena::bytes_of<T>(samples * d.hidden_padded) +
               Arena::bytes_of<T>(samples * d.outputs_padded) + 2 * Arena::bytes_of<T>(d.hidden_padded);
    }

    RayGradients(std::int64_t samples, const Decoder<T>& d, Arena& arena) {
        for (T** p : {&weights, &sorted_sigma, &sorted_t, &sigma, &x, &y, &z}) *p = arena.template take<T>(samples);
        hidden = arena.template take<T>(samples * d.hidden_padded);
        colors = arena.template take<T>(samples * d.outputs_padded);
        composited = arena.template take<T>(d.hidden_padded), q = arena.template take<T>(d.hidden_padded);
    }
};

// Gradients of hidden units (into g.hidden) and of sample weights (into g.weights, by place along the ray) from the
// gradient of the composited colours.
template <class T, class Representation>
void backward_composite(const Field& field, const FieldOfScene<T, Representation>& scene, const Decoder<T>& d,
                        const RayTrace<T, Representation>& trace, std::int64_t samples, const T* g_features,
                        RayGradients<T>& g, DecoderGradients<T>& sums) {
    const auto& batch = trace.batch;
    if (field.activation == kNoActivation) {
        std::fill(g.q, g.q + d.hidden_padded, T(0)), std::fill(g.composited, g.composited + d.hidden_padded, T(0));
        T bias_part = 0, total = 0;
        for (std::int64_t o = 0; o < d.outputs; ++o) {
            add_scaled(g.q, g_features[o], d.color_weight + o * d.hidden_padded, d.hidden_padded);
            bias_part += g_features[o] * d.color_bias[o];
        }
        for (std::int64_t i = 0; i < samples; ++i) {
            const T weight = trace.sample_weights[i];
            const std::int32_t point = trace.point_of[trace.order[i]];
            total += weight;
            g.weights[i] = bias_part;
            if (point < 0) continue;
            const T* const h = batch.hidden + point * d.hidden_padded;
            g.weights[i] += dot(h, g.q, d.hidden_padded);
            add_scaled(g.composited, weight, h, d.hidden_padded);
            T* const gh = g.hidden + point * d.hidden_padded;
            SPHEREHEAD_SIMD
            for (std::int64_t u = 0; u < d.hidden_padded; ++u) gh[u] = weight * g.q[u];
        }
        for (std::int64_t o = 0; o < d.outputs; ++o) {
            add_scaled(sums.color_weight + o * d.hidden_padded, g_features[o], g.composited, d.hidden_padded);
            sums.color_bias[o] += g_features[o] * total;
        }
        return;
    }
    scene.linear_colors(batch, g.colors);
    for (std::int64_t i = 0; i < samples; ++i) {
        const std::int32_t point = trace.point_of[trace.order[i]];
        g.weights[i] = 0;
        if (point < 0) continue;
        T* const color = g.colors + point * d.outputs_padded;
        for (std::int64_t o = 0; o < d.outputs_padded; ++o) {
            const T linear = color[o], gradient = o < d.outputs ? g_features[o] : T(0);
            g.weights[i] += gradient * activate(linear, field.activation);
            color[o] = gradient * trace.sample_weights[i] * activation_slope(linear, field.activation);
        }
    }
    backward_colors(d, batch.hidden, batch.count, g.colors, g.hidden, sums);
}

template <class T, class Representation>
void backward_ray(const Field& field, const FieldOfScene<T, Representation>& scene, const Decoder<T>& d, const Rays& rays,
                  const RenderGradients& gradients, std::int64_t index, RayTrace<T, Representation>& trace,
                  RayGradients<T>& g, DecoderGradients<T>& sums, T* g_point_features) {
    const std::int64_t samples = rays.coarse + rays.fine;
    trace.run(scene, field.box_scale, index);
    backward_composite(field, scene, d, trace, samples, row<T>(gradients.features, index, field.outputs), g, sums);

    // From samples to intervals; opacity and depth are sums over intervals.
    const T g_depth = *row<T>(gradients.depth, index, 1), g_accumulation = *row<T>(gradients.accumulation, index, 1);
    T accumulation = 0, depth = 0;
    for (std::int64_t i = 0; i < samples - 1; ++i) {
        accumulation += trace.weights[i];
        depth += trace.weights[i] * (trace.sorted_t[i] + trace.sorted_t[i + 1]) * T(0.5);
    }
    const T inverse = accumulation > T(0) ? T(1) / accumulation : T(0);
    depth *= inverse;
    std::fill(g.sorted_t, g.sorted_t + samples, T(0));
    for (std::int64_t i = 0; i < samples - 1; ++i) {
        const T middle = (trace.sorted_t[i] + trace.sorted_t[i + 1]) * T(0.5);
        g.weights[i] = (g.weights[i] + g.weights[i + 1]) * T(0.5) + g_accumulation + g_depth * (middle - depth) * inverse;
        const T g_middle = g_depth * trace.weights[i] * inverse * T(0.5);
        g.sorted_t[i] += g_middle, g.sorted_t[i + 1] += g_middle;
    }
    trace.backward_march(g.weights, g.sorted_sigma, g.sorted_t);
    for (std::int64_t i = 0; i < samples; ++i) {
        const std::int32_t point = trace.point_of[trace.order[i]];
        if (point >= 0) g.sigma[point] = g.sorted_sigma[i];
    }
    scene.backward_decoder(trace.batch, g.sigma, g.hidden, g_point_features, sums);

    if (gradients.origins == nullptr) return;
    scene.backward_positions(trace.batch, g_point_features, g.x, g.y, g.z);
    T g_origin[3] = {}, g_direction[3] = {}, g_near = 0, g_far = 0;
    const T* const jitter = row<T>(rays.coarse_jitter, index, rays.coarse);
    for (std::int64_t i = 0; i < samples; ++i) {
        const std::int32_t sample = trace.order[i], point = trace.point_of[sample];
        const T t = trace.sorted_t[i];
        T g_t = g.sorted_t[i];
        if (point >= 0) {
            const T g_position[3] = {g.x[point] * T(field.box_scale), g.y[point] * T(field.box_scale),
                                     g.z[point] * T(field.box_scale)};
            for (int k = 0; k < 3; ++k) {
                g_origin[k] += g_position[k];
                g_direction[k] += t * g_position[k];
                g_t += g_position[k] * trace.direction[k];
            }
        }
        if (sample >= rays.coarse) continue;  // depths of fine samples are constants
        const T fraction = coarse_fraction(std::int64_t(sample), jitter[sample], rays.coarse);
        g_near += g_t * (T(1) - fraction), g_far += g_t * fraction;
    }
    std::copy(g_origin, g_origin + 3, row<T>(gradients.origins, index, 3));
    std::copy(g_direction, g_direction + 3, row<T>(gradients.directions, index, 3));
    *row<T>(gradients.near_limits, index, 1) = g_near, *row<T>(gradients.far_limits, index, 1) = g_far;
}

template <class T, class Representation>
void render_backward(const Field& field, const Rays& rays, const RenderGradients& gradients) {
    const Decoder<T> d(field);
    const std::int64_t samples = rays.coarse + rays.fine;
    backward_in_chunks<T, Representation>(
        field, d, gradients.field, rays.rays, kRaysPerTask, samples,
        [&](std::int64_t scene, std::int64_t begin, std::int64_t end, std::int64_t slot, DecoderGradients<T> sums,
            Scatter<T, Representation>& scatter) {
            Arena arena(RayTrace<T, Representation>::bytes(rays, d) + RayGradients<T>::bytes(samples, d));
            RayTrace<T, Representation> trace(rays, d, arena);
            RayGradients<T> g(samples, d, arena);
            const FieldOfScene<T, Representation> of_scene(field, d, scene);
            for (std::int64_t r = begin; r < end; ++r, ++slot) {
                backward_ray(field, of_scene, d, rays, gradients, scene * rays.rays + r, trace, g, sums,
                             scatter.features(slot));
                scatter.keep(slot, trace.batch);
            }
        });
}

template <class T, class Representation>
void query_backward(const Field& field, const Points& points, const void* g_sigma, const void* g_features,
                    const FieldGradients& gradients, void* g_points) {
    const Decoder<T> d(field);
    constexpr std::int64_t kBatch = 96;
    const std::int64_t units = (points.count + kBatch - 1) / kBatch;
    using Batch = PointBatch<T, Representation>;
    backward_in_chunks<T, Representation>(
        field, d, gradients, units, kRaysPerTask, kBatch,
        [&](std::int64_t scene, std::int64_t begin, std::int64_t end, std::int64_t slot, DecoderGradients<T> sums,
            Scatter<T, Representation>& scatter) {
            Arena arena(Batch::bytes(kBatch, d) + Arena::bytes_of<T>(kBatch * d.outputs_padded) +
                        Arena::bytes_of<T>(kBatch * d.hidden_padded) + 3 * Arena::bytes_of<T>(kBatch));
            Batch batch(kBatch, d, arena);
            T* const colors = arena.template take<T>(kBatch * d.outputs_padded);
            T* const g_hidden = arena.template take<T>(kBatch * d.hidden_padded);
            T *const gx = arena.template take<T>(kBatch), *const gy = arena.template take<T>(kBatch);
            T* const gz = arena.template take<T>(kBatch);
            const FieldOfScene<T, Representation> of_scene(field, d, scene);
            for (std::int64_t unit = begin; unit < end; ++unit, ++slot) {
                const std::int64_t first = unit * kBatch, index = scene * points.count + first;
                batch.count = std::min(kBatch, points.count - first);
                const T* const from = row<T>(points.points, index, 3);
                for (std::int64_t i = 0; i < batch.count; ++i) {
                    batch.x[i] = from[3 * i] * T(field.box_scale);
                    batch.y[i] = from[3 * i + 1] * T(field.box_scale);
                    batch.z[i] = from[3 * i + 2] * T(field.box_scale);
                }
                of_scene.evaluate(batch);
                if (g_features == nullptr) {
                    std::fill(g_hidden, g_hidden + batch.count * d.hidden_padded, T(0));
                } else {
                    of_scene.linear_colors(batch, colors);
                    for (std::int64_t i = 0; i < batch.count; ++i) {
                        const T* const g = row<T>(g_features, index + i, field.outputs);
                        T* const color = colors + i * d.outputs_padded;
                        for (std::int64_t o = 0; o < d.outputs_padded; ++o)
                            color[o] = o < d.outputs ? g[o] * activation_slope(color[o], field.activation) : T(0);
                    }
                    backward_colors(d, batch.hidden, batch.count, colors, g_hidden, sums);
                }
                T* const g_point_features = scatter.features(slot);
                of_scene.backward_decoder(batch, row<T>(g_sigma, index, 1), g_hidden, g_point_features, sums);
                scatter.keep(slot, batch);
                if (g_points == nullptr) continue;
                of_scene.backward_positions(batch, g_point_features, gx, gy, gz);
                T* const to = row<T>(g_points, index, 3);
                for (std::int64_t i = 0; i < batch.count; ++i) {
                    to[3 * i] = gx[i] * T(field.box_scale);
                    to[3 * i + 1] = gy[i] * T(field.box_scale);
                    to[3 * i + 2] = gz[i] * T(field.box_scale);
                }
            }
        });
}

// 0: done; 1: out of memory; 2: unknown representation.
template <class T, class F>
int run(const Field& field, const F& f) {
    try {
        return with_representation<T>(field.representation, f) ? 0 : 2;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace
}  // namespace spherehead::SPHEREHEAD_ISA

#define SPHEREHEAD_KERNELS(T, suffix)                                                                                  \
    SPHEREHEAD_EXPORT(int, volume_render_##suffix)                                                                     \
    (const spherehead::Field* field, const spherehead::Rays* rays, const spherehead::RenderOutputs* outputs) {         \
        using namespace spherehead::SPHEREHEAD_ISA;                                                                    \
        return run<T>(*field, [&]<class R>() { render<T, R>(*field, *rays, *outputs); });                              \
    }                                                                                                                  \
    SPHEREHEAD_EXPORT(int, volume_render_backward_##suffix)                                                            \
    (const spherehead::Field* field, const spherehead::Rays* rays, const spherehead::RenderGradients* gradients) {     \
        using namespace spherehead::SPHEREHEAD_ISA;                                                                    \
        return run<T>(*field, [&]<class R>() { render_backward<T, R>(*field, *rays, *gradients); });                   \
    }                                                                                                                  \
    SPHEREHEAD_EXPORT(int, query_field_##suffix)                                                                       \
    (const spherehead::Field* field, const spherehead::Points* points, void* sigma, void* features) {                  \
        using namespace spherehead::SPHEREHEAD_ISA;                                                                    \
        return run<T>(*field, [&]<class R>() { query<T, R>(*field, *points, sigma, features); });                      \
    }                                                                                                                  \
    SPHEREHEAD_EXPORT(int, query_field_backward_##suffix)                                                              \
    (const spherehead::Field* field, const spherehead::Points* points, const void* g_sigma, const void* g_features,    \
     const spherehead::FieldGradients* gradients, void* g_points) {                                                    \
        using namespace spherehead::SPHEREHEAD_ISA;                                                                    \
        return run<T>(*field,                                                                                          \
                      [&]<class R>() { query_backward<T, R>(*field, *points, g_sigma, g_features, *gradients, g_points); }); \
    }

SPHEREHEAD_KERNELS(float, f32)
SPHEREHEAD_KERNELS(double, f64)
