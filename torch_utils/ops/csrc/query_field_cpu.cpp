// Field queries on a CPU.
#include <numeric>

#include "field_backward_cpu.h"

namespace spherehead::SPHEREHEAD_ISA {
namespace {

constexpr std::int64_t kBatch = 96;           // points that are evaluated together
constexpr std::int64_t kBatchesPerTask = 16, kPointsPerTask = kBatchesPerTask * kBatch;

// Cell of a coordinate in [-1, 1], with its bits spread so that those of three axes interleave.
template <class T>
std::uint32_t spread_cell(T coordinate, int bits) {
    const T cells = T(1 << bits);
    const T position = (coordinate + T(1)) * T(0.5) * cells;
    std::uint32_t cell = position > T(0) ? std::uint32_t(min_of(position, cells - T(1))) : 0, spread = 0;
    for (int bit = 0; bit < bits; ++bit) spread |= (cell >> bit & 1) << (3 * bit);
    return spread;
}

// The order in which the points of a scene are worked on: along a space-filling curve (Morton's), because neighbours read
// the same texels. Twice as fast for a dense grid on a processor with 512 KiB of cache per core.
template <class T>
std::vector<std::int32_t> point_order(const Field& field, const Points& points, std::int64_t scene) {
    constexpr int kBits = 5;
    constexpr std::int64_t kCells = std::int64_t{1} << (3 * kBits);
    std::vector<std::int32_t> order(points.count);
    if (points.count < kCells / 8) {
        std::iota(order.begin(), order.end(), 0);
        return order;
    }
    const T* const from = row<T>(points.points, scene * points.count, 3);
    std::vector<std::uint32_t> cells(points.count);
    std::vector<std::int32_t> begin(kCells + 1);
    for (std::int64_t i = 0; i < points.count; ++i) {
        std::uint32_t cell = 0;
        for (int axis = 0; axis < 3; ++axis)
            cell |= spread_cell(from[3 * i + axis] * T(field.box_scale), kBits) << axis;
        cells[i] = cell;
        ++begin[cell + 1];
    }
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    for (std::int64_t i = 0; i < points.count; ++i) order[begin[cells[i]]++] = std::int32_t(i);
    return order;
}

template <class T>
std::vector<std::vector<std::int32_t>> point_orders(const Field& field, const Points& points) {
    std::vector<std::vector<std::int32_t>> orders(field.scenes);
    parallel_for(field.scenes, [&](std::int64_t scene) { orders[scene] = point_order<T>(field, points, scene); });
    return orders;
}

// Fills the positions of the points of a scene with these indices.
template <class T, class Representation>
void fill(PointBatch<T, Representation>& batch, const Field& field, const Points& points, std::int64_t scene,
          const std::int32_t* indices, std::int64_t count) {
    batch.count = count;
    const T *const from = row<T>(points.points, scene * points.count, 3), scale = T(field.box_scale);
    for (std::int64_t i = 0; i < count; ++i) {
        const T* const point = from + 3 * indices[i];
        batch.x[i] = point[0] * scale, batch.y[i] = point[1] * scale, batch.z[i] = point[2] * scale;
    }
}

template <class T, class Representation>
void query(const Field& field, const Points& points, void* out_sigma, void* out_features) {
    using Batch = PointBatch<T, Representation>;
    const Decoder<T> d(field);
    const auto orders = point_orders<T>(field, points);
    const std::int64_t tasks_per_scene = (points.count + kPointsPerTask - 1) / kPointsPerTask;
    parallel_for(field.scenes * tasks_per_scene, [&](std::int64_t task) {
        const std::int64_t scene = task / tasks_per_scene, begin = task % tasks_per_scene * kPointsPerTask;
        const std::int64_t end = std::min(begin + kPointsPerTask, points.count), base = scene * points.count;
        Arena arena(Batch::bytes(kBatch, d) + Arena::bytes_of<T>(kBatch * d.outputs_padded));
        Batch batch(kBatch, d, arena);
        T* const colors = arena.template take<T>(kBatch * d.outputs_padded);
        const FieldOfScene<T, Representation> of_scene(field, d, scene);
        for (std::int64_t first = begin; first < end; first += kBatch) {
            const std::int32_t* const indices = orders[scene].data() + first;
            fill(batch, field, points, scene, indices, std::min(kBatch, end - first));
            of_scene.evaluate(batch);
            for (std::int64_t i = 0; i < batch.count; ++i) {
                const T* const noise = row<T>(points.noise, base + indices[i], 1);
                *row<T>(out_sigma, base + indices[i], 1) =
                    batch.sigma[i] + (noise ? *noise * T(points.density_noise) : T(0));
            }
            if (out_features == nullptr) continue;
            of_scene.linear_colors(batch, colors);
            for (std::int64_t i = 0; i < batch.count; ++i) {
                T* const to = row<T>(out_features, base + indices[i], field.outputs);
                const T* const color = colors + i * d.outputs_padded;
                SPHEREHEAD_SIMD
                for (std::int64_t o = 0; o < field.outputs; ++o) to[o] = activate(color[o], field.activation);
            }
        }
    });
}

// Scratch of the backward pass of a batch.
template <class T>
struct PointGradients {
    T *sigma, *x, *y, *z;  // by point of the batch
    T *hidden, *colors;    // [points, U'], [points, O']

    static std::int64_t bytes(const Decoder<T>& d) {
        return 4 * Arena::bytes_of<T>(kBatch) + Arena::bytes_of<T>(kBatch * d.hidden_padded) +
               Arena::bytes_of<T>(kBatch * d.outputs_padded);
    }

    PointGradients(const Decoder<T>& d, Arena& arena) {
        for (T** p : {&sigma, &x, &y, &z}) *p = arena.template take<T>(kBatch);
        hidden = arena.template take<T>(kBatch * d.hidden_padded);
        colors = arena.template take<T>(kBatch * d.outputs_padded);
    }
};

template <class T, class Representation>
void backward_batch(const Field& field, const FieldOfScene<T, Representation>& scene, const Decoder<T>& d,
                    const PointBatch<T, Representation>& batch, const std::int32_t* indices, const T* g_sigma,
                    const T* g_features, T* g_points, PointGradients<T>& g, DecoderGradients<T>& sums,
                    T* g_point_features) {
    for (std::int64_t i = 0; i < batch.count; ++i) g.sigma[i] = g_sigma[indices[i]];
    if (g_features == nullptr) {
        std::fill(g.hidden, g.hidden + batch.count * d.hidden_padded, T(0));
    } else {
        scene.linear_colors(batch, g.colors);
        for (std::int64_t i = 0; i < batch.count; ++i) {
            const T* const gradient = g_features + indices[i] * field.outputs;
            T* const color = g.colors + i * d.outputs_padded;
            for (std::int64_t o = 0; o < d.outputs_padded; ++o)
                color[o] = o < d.outputs ? gradient[o] * activation_slope(color[o], field.activation) : T(0);
        }
        backward_colors(d, batch.hidden, batch.count, g.colors, g.hidden, sums);
    }
    scene.backward_decoder(batch, g.sigma, g.hidden, g_point_features, sums);
    if (g_points == nullptr) return;
    scene.backward_positions(batch, g_point_features, g.x, g.y, g.z);
    for (std::int64_t i = 0; i < batch.count; ++i) {
        T* const to = g_points + std::int64_t(3) * indices[i];
        to[0] = g.x[i] * T(field.box_scale);
        to[1] = g.y[i] * T(field.box_scale);
        to[2] = g.z[i] * T(field.box_scale);
    }
}

template <class T, class Representation>
void query_backward(const Field& field, const Points& points, const void* g_sigma, const void* g_features,
                    const FieldGradients& gradients, void* g_points) {
    using Batch = PointBatch<T, Representation>;
    const Decoder<T> d(field);
    const auto orders = point_orders<T>(field, points);
    const std::int64_t batches = (points.count + kBatch - 1) / kBatch;
    backward_in_chunks<T, Representation>(
        field, d, gradients, batches, kBatchesPerTask, kBatch,
        [&](std::int64_t scene, std::int64_t begin, std::int64_t end, std::int64_t slot, DecoderGradients<T> sums,
            Scatter<T, Representation>& scatter) {
            Arena arena(Batch::bytes(kBatch, d) + PointGradients<T>::bytes(d));
            Batch batch(kBatch, d, arena);
            PointGradients<T> g(d, arena);
            const FieldOfScene<T, Representation> of_scene(field, d, scene);
            const std::int64_t base = scene * points.count;
            for (std::int64_t i = begin; i < end; ++i, ++slot) {
                const std::int32_t* const indices = orders[scene].data() + i * kBatch;
                fill(batch, field, points, scene, indices, std::min(kBatch, points.count - i * kBatch));
                of_scene.evaluate(batch);
                backward_batch(field, of_scene, d, batch, indices, row<T>(g_sigma, base, 1),
                               row<T>(g_features, base, field.outputs), row<T>(g_points, base, 3), g, sums,
                               scatter.features(slot));
                scatter.keep(slot, batch);
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
