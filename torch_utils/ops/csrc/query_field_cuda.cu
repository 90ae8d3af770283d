// Field queries on a GPU: points to density and colours, forward and backward; see volume_render_cuda.cu.
#include "launch_cuda.cuh"

namespace spherehead::SPHEREHEAD_ISA {
namespace {

constexpr int kQueryTile = 64, kQueryCapacity = 128, kQueryTileBackward = 32, kQueryCapacityBackward = 96;

struct QueryTask {
    FieldTask field;
    Points points;
    float density_noise;
    float *sigma, *features;            // null where not wanted
    const float *g_sigma, *g_features;  // null where there are none
    float* g_points;
    std::int64_t tiles_per_scene, first_tile, end_tile;
};

// The points of one tile, and their first index among those of all scenes.
struct QueryTile {
    std::int64_t scene, first;
    int count;

    SPHEREHEAD_DEVICE static QueryTile at(const QueryTask& task, std::int64_t index) {
        const std::int64_t scene = index / task.tiles_per_scene;
        const std::int64_t begin = index % task.tiles_per_scene * task.field.shape.capacity;
        const std::int64_t left = task.points.count - begin;
        return {scene, scene * task.points.count + begin,
                static_cast<int>(min_of<std::int64_t>(left, task.field.shape.capacity))};
    }
};

template <bool kAllShared>
SPHEREHEAD_DEVICE void evaluate_tile(const FieldBlock<kAllShared>& block, const QueryTask& task,
                                     const QueryTile& tile) {
    const float* const from = static_cast<const float*>(task.points.points) + 3 * tile.first;
    for_each_thread(tile.count, [&](int i) {
        block.at(kPointX)[i] = from[3 * i] * block.shape.box_scale;
        block.at(kPointY)[i] = from[3 * i + 1] * block.shape.box_scale;
        block.at(kPointZ)[i] = from[3 * i + 2] * block.shape.box_scale;
    });
    __syncthreads();
    block.evaluate(tile.scene, 0, tile.count);
}

template <bool kAllShared>
__global__ void __launch_bounds__(kThreads, 2) query_kernel(const __grid_constant__ QueryTask task) {
    SPHEREHEAD_DYNAMIC_SHARED(shared);
    const FieldBlock<kAllShared> block(task.field, shared);
    using Tile = typename FieldBlock<kAllShared>::ColorTile;
    const int outputs = block.shape.outputs;
    block.load_decoder();
    for (std::int64_t index = task.first_tile + blockIdx.x; index < task.end_tile; index += gridDim.x) {
        const QueryTile tile = QueryTile::at(task, index);
        evaluate_tile(block, task, tile);
        const float* const noise = static_cast<const float*>(task.points.noise);
        for_each_thread(tile.count, [&](int i) {
            const float added = noise ? noise[tile.first + i] * task.density_noise : 0.0f;
            task.sigma[tile.first + i] = block.at(kPointSigma)[i] + added;
        });
        if (task.features != nullptr) {
            block.linear_colors(tile.count, [&](int first, int rows, int column, const Tile& colors) {
#pragma unroll
                for (int r = 0; r < kTileRows; ++r)
#pragma unroll
                    for (int v = 0; v < kTileColumns; ++v) {
                        const int o = column + Tile::column() + v;
                        if (Tile::row(r) >= rows || o >= outputs) continue;
                        task.features[(tile.first + first + Tile::row(r)) * outputs + o] =
                            activate(colors.sums[r][v], block.shape.activation);
                    }
            });
        }
        __syncthreads();
    }
}

template <bool kAllShared>
__global__ void __launch_bounds__(kThreads, 2) query_backward_kernel(const __grid_constant__ QueryTask task) {
    SPHEREHEAD_DYNAMIC_SHARED(shared);
    const FieldBlock<kAllShared> block(task.field, shared);
    using Tile = typename FieldBlock<kAllShared>::ColorTile;
    const FieldShape& shape = block.shape;
    block.load_decoder();
    for (std::int64_t index = task.first_tile + blockIdx.x; index < task.end_tile; index += gridDim.x) {
        const QueryTile tile = QueryTile::at(task, index);
        evaluate_tile(block, task, tile);
        for_each_thread(tile.count, [&](int i) {
            block.at(kPointGradient)[i] = task.g_sigma != nullptr ? task.g_sigma[tile.first + i] : 0.0f;
        });
        float* const g_linear = block.at(kTaps);
        if (task.g_features != nullptr) {
            block.linear_colors(tile.count, [&](int first, int rows, int column, const Tile& colors) {
#pragma unroll
                for (int r = 0; r < kTileRows; ++r)
#pragma unroll
                    for (int v = 0; v < kTileColumns; ++v) {
                        const int o = column + Tile::column() + v, point = first + Tile::row(r);
                        if (Tile::row(r) >= rows) continue;
                        const float g =
                            o < shape.outputs ? task.g_features[(tile.first + point) * shape.outputs + o] : 0.0f;
                        g_linear[point * shape.color_stride + o] =
                            g * activation_slope(colors.sums[r][v], shape.activation);
                    }
            });
        }
        __syncthreads();
        if (task.g_features != nullptr && task.field.want_sums) block.add_color_sums(tile.count);
        block.backward(tile.scene, tile.count, g_linear, shape.color_stride, block.at(kColorWeight),
                       task.g_features != nullptr ? shape.outputs : 0);
        if (task.field.want_positions) {
            float* const to = task.g_points + 3 * tile.first;
            for_each_thread(tile.count, [&](int i) {
                to[3 * i] = block.at(kPointX)[i] * shape.box_scale;
                to[3 * i + 1] = block.at(kPointY)[i] * shape.box_scale;
                to[3 * i + 2] = block.at(kPointZ)[i] * shape.box_scale;
            });
        }
        __syncthreads();
    }
    block.store_sums();
}

// `gradients` is null for the forward pass.
cudaError_t plan_query(const Field& field, const Points& points, const FieldGradients* gradients, float* g_points,
                       const CudaOptions& options, QueryTask& task, Launch<QueryTask>& launch) {
    if (!is_supported(field, options)) return cudaErrorInvalidValue;
    task = {};
    task.field.field = field;
    task.field.shape = gradients ? shape_of(field, options, kQueryCapacityBackward, kQueryTileBackward)
                                 : shape_of(field, options, kQueryCapacity, kQueryTile);
    if (task.field.shape.planes == 0) return cudaErrorInvalidValue;
    task.points = points;
    task.density_noise = float(points.density_noise);
    task.field.reads_colors = true;
    const int capacity = task.field.shape.capacity;
    task.tiles_per_scene = (points.count + capacity - 1) / capacity;
    task.end_tile = field.scenes * task.tiles_per_scene;
    if (gradients != nullptr) {
        if (!is_aligned(gradients->planes)) return cudaErrorInvalidValue;
        task.g_points = g_points;
        describe_gradients(task.field, *gradients, g_points != nullptr, points.count, options);
    }
    return gradients ? prepare(task.field, 0, task.end_tile, options, query_backward_kernel<true>,
                               query_backward_kernel<false>, launch)
                     : prepare(task.field, 0, task.end_tile, options, query_kernel<true>, query_kernel<false>, launch);
}

}  // namespace
}  // namespace spherehead::SPHEREHEAD_ISA

using namespace spherehead;
using namespace spherehead::SPHEREHEAD_ISA;

// Bytes that query_field_cuda (gradients null) or query_field_backward_cuda needs in its workspace.
extern "C" int query_field_workspace_cuda(const Field* field, const Points* points, const FieldGradients* gradients,
                                          const CudaOptions* options, std::int64_t* bytes) {
    *bytes = kHeaderBytes;
    if (field->scenes * points->count == 0) return cudaSuccess;
    const DeviceScope device(int(options->device));
    SPHEREHEAD_TRY(device.error);
    QueryTask task;
    Launch<QueryTask> launch;
    SPHEREHEAD_TRY(plan_query(*field, *points, gradients, nullptr, *options, task, launch));
    *bytes = launch.workspace_bytes();
    return cudaSuccess;
}

// `features` may be null.
extern "C" int query_field_cuda(const Field* field, const Points* points, void* sigma, void* features,
                                const CudaOptions* options) {
    if (field->scenes * points->count == 0) return cudaSuccess;
    const DeviceScope device(int(options->device));
    SPHEREHEAD_TRY(device.error);
    QueryTask task;
    Launch<QueryTask> launch;
    SPHEREHEAD_TRY(plan_query(*field, *points, nullptr, nullptr, *options, task, launch));
    if (!has_workspace(launch, *options)) return cudaErrorInvalidValue;
    task.sigma = static_cast<float*>(sigma), task.features = static_cast<float*>(features);
    return start(launch, task, task.field, stream_of(*options));
}

// Any of `g_sigma`, `g_features` (zeros) and `g_points` (not wanted) may be null.
extern "C" int query_field_backward_cuda(const Field* field, const Points* points, const void* g_sigma,
                                         const void* g_features, const FieldGradients* gradients, void* g_points,
                                         const CudaOptions* options) {
    if (field->scenes * points->count == 0) return cudaSuccess;
    const DeviceScope device(int(options->device));
    SPHEREHEAD_TRY(device.error);
    QueryTask task;
    Launch<QueryTask> launch;
    SPHEREHEAD_TRY(plan_query(*field, *points, gradients, static_cast<float*>(g_points), *options, task, launch));
    if (!has_workspace(launch, *options)) return cudaErrorInvalidValue;
    task.g_sigma = static_cast<const float*>(g_sigma), task.g_features = static_cast<const float*>(g_features);
    const auto select = [](QueryTask second, std::int64_t scene) {
        keep_planes_only(second.field);
        second.first_tile = scene * second.tiles_per_scene,
        second.end_tile = second.first_tile + second.tiles_per_scene;
        return second;
    };
    return run_backward(launch, task, &QueryTask::field, *gradients, stream_of(*options), select);
}
