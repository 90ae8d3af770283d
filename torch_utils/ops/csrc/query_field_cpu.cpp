// Field queries on a CPU.
#include "field_backward_cpu.h"

namespace spherehead::SPHEREHEAD_ISA {
namespace {

constexpr std::int64_t kBatch = 96;           // points that are evaluated together
constexpr std::int64_t kBatchesPerTask = 16, kPointsPerTask = kBatchesPerTask * kBatch;

// Fills the positions of points [first, first + kBatch) of a scene, as far as they are there.
template <class T, class Representation>
void fill(PointBatch<T, Representation>& batch, const Field& field, const Points& points, std::int64_t scene,
          std::int64_t first) {
    batch.count = std::min(kBatch, points.count - first);
    const T *const from = row<T>(points.points, scene * points.count + first, 3), scale = T(field.box_scale);
    for (std::int64_t i = 0; i < batch.count; ++i)
        batch.x[i] = from[3 * i] * scale, batch.y[i] = from[3 * i + 1] * scale, batch.z[i] = from[3 * i + 2] * scale;
}

template <class T, class Representation>
void query(const Field& field, const Points& points, void* out_sigma, void* out_features) {
    const Decoder<T> d(field);
    const std::int64_t tasks_per_scene = (points.count + kPointsPerTask - 1) / kPointsPerTask;
    parallel_for(field.scenes * tasks_per_scene, [&](std::int64_t task) {
        using Batch = PointBatch<T, Representation>;
        const std::int64_t scene = task / tasks_per_scene, begin = task % tasks_per_scene * kPointsPerTask;
        const std::int64_t end = std::min(begin + kPointsPerTask, points.count);
        Arena arena(Batch::bytes(kBatch, d) + Arena::bytes_of<T>(kBatch * d.outputs_padded));
        Batch batch(kBatch, d, arena);
        T* const colors = arena.template take<T>(kBatch * d.outputs_padded);
        const FieldOfScene<T, Representation> of_scene(field, d, scene);
        for (std::int64_t first = begin; first < end; first += kBatch) {
            fill(batch, field, points, scene, first);
            of_scene.evaluate(batch);
            const std::int64_t index = scene * points.count + first;
            const T* const noise = row<T>(points.noise, index, 1);
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

template <class T, class Representation>
void query_backward(const Field& field, const Points& points, const void* g_sigma, const void* g_features,
                    const FieldGradients& gradients, void* g_points) {
    const Decoder<T> d(field);
    const std::int64_t units = (points.count + kBatch - 1) / kBatch;
    using Batch = PointBatch<T, Representation>;
    backward_in_chunks<T, Representation>(
        field, d, gradients, units, kBatchesPerTask, kBatch,
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
                fill(batch, field, points, scene, first);
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

}  // namespace
}  // namespace spherehead::SPHEREHEAD_ISA

#define SPHEREHEAD_KERNELS(T, suffix)                                                                                \
    SPHEREHEAD_EXPORT(int, query_field_##suffix)                                                                     \
    (const spherehead::Field* field, const spherehead::Points* points, void* sigma, void* features) {                \
        using namespace spherehead::SPHEREHEAD_ISA;                                                                  \
        return run_kernel<T>(*field, [&]<class R>() { query<T, R>(*field, *points, sigma, features); });             \
    }                                                                                                                \
    SPHEREHEAD_EXPORT(int, query_field_backward_##suffix)                                                            \
    (const spherehead::Field* field, const spherehead::Points* points, const void* g_sigma, const void* g_features,  \
     const spherehead::FieldGradients* gradients, void* g_points) {                                                  \
        using namespace spherehead::SPHEREHEAD_ISA;                                                                  \
        return run_kernel<T>(*field, [&]<class R>() {                                                                \
            query_backward<T, R>(*field, *points, g_sigma, g_features, *gradients, g_points);                        \
        });                                                                                                          \
    }

SPHEREHEAD_KERNELS(float, f32)
SPHEREHEAD_KERNELS(double, f64)
