// How kernels of the field are launched: where a block keeps what, how many blocks there are, what the workspace holds.
#pragma once

#include <algorithm>

#include "field_cuda.cuh"

namespace spherehead {

// Repeated in torch_utils/ops/volume_render_cuda.py.
struct CudaOptions {
    void* stream;
    void* workspace;  // aligned to 16 bytes
    std::int64_t workspace_bytes;
    std::int64_t device, texel_type;
    std::int64_t deterministic;  // whether gradients of planes are the same in every run
};

}  // namespace spherehead

namespace spherehead::SPHEREHEAD_ISA {
namespace {

// ---- sums of all blocks ----

SPHEREHEAD_DEVICE void add_to(void* data, std::int64_t index, float value) {
    if (data != nullptr) static_cast<float*>(data)[index] += value;
}

// Adds the sums of all blocks to the gradients that the caller gets.
__global__ void __launch_bounds__(kThreads)
    add_sums_kernel(const __grid_constant__ FieldTask task, FieldGradients to, int blocks) {
    const FieldShape& s = task.shape;
    const DecoderSums sums = DecoderSums::of(s);
    const int i = int(blockIdx.x) * kThreads + thread_index();
    if (i > sums.sigma_bias) return;
    float sum = 0.0f;
    for (int b = 0; b < blocks; ++b) sum += task.sums[std::int64_t(b) * sums.size + i];
    const int u = i % s.hidden_padded;  // every part but the biases at the end has rows of U'
    const bool is_unit = u < s.hidden;
    if (i < sums.hidden_bias) {
        if (is_unit) add_to(to.hidden_weight, std::int64_t(u) * s.channels + i / s.hidden_padded, sum);
    } else if (i < sums.sigma_weight) {
        if (is_unit) add_to(to.hidden_bias, u, sum);
    } else if (i < sums.color_weight) {
        if (is_unit) add_to(to.output_weight, u, sum);
    } else if (i < sums.color_bias) {
        const int o = (i - sums.color_weight) / s.hidden_padded;
        if (is_unit && o < s.outputs) add_to(to.output_weight, std::int64_t(1 + o) * s.hidden + u, sum);
    } else if (i < sums.sigma_bias) {
        const int o = i - sums.color_bias;
        if (o < s.outputs) add_to(to.output_bias, 1 + o, sum);
    } else {
        add_to(to.output_bias, 0, sum);
    }
}

// Adds the fixed-point sums of one scene to its gradients.
__global__ void __launch_bounds__(kThreads)
    add_fixed_kernel(const __grid_constant__ FieldTask task, float* to, std::int64_t count) {
    const int exponent = fixed_point_exponent(*task.largest, task.contribution_bits);
    for (std::int64_t i = std::int64_t(blockIdx.x) * kThreads + thread_index(); i < count;
         i += std::int64_t(gridDim.x) * kThreads) {
        const long long sum = task.fixed_sums[i];
        if (sum != 0) to[i] += ldexpf(__ll2float_rn(sum), -exponent);
    }
}

// ---- plans, on the host ----

constexpr int kMaxWidth = 256;  // of channels, hidden units and colour features
constexpr std::int64_t kHeaderBytes = 256, kMaxGlobalBytes = std::int64_t(1) << 30;

constexpr std::int64_t round_up(std::int64_t count, std::int64_t multiple) {
    return (count + multiple - 1) / multiple * multiple;
}

// How far a scene's planes reach in memory, in elements.
std::int64_t scene_extent(const Field& f, int planes) {
    return (planes - 1) * f.plane_stride + (f.depth - 1) * f.depth_stride + (f.height - 1) * f.row_stride +
           (f.width - 1) * f.column_stride + f.channels;
}

bool is_supported(const Field& f, const CudaOptions& options) {
    const std::int64_t per_load = options.texel_type == kFloat32 ? 4 : 8;
    const auto is_whole = [&](std::int64_t size, std::int64_t stride) { return size == 1 || stride % per_load == 0; };
    if (!is_whole(f.scenes, f.scene_stride) || !is_whole(f.depth, f.depth_stride) ||
        !is_whole(f.height, f.row_stride) || !is_whole(f.width, f.column_stride) || f.plane_stride % per_load != 0)
        return false;
    const auto is_width = [](std::int64_t width) { return width >= 1 && width <= kMaxWidth; };
    return options.texel_type >= kFloat32 && options.texel_type <= kBFloat16 &&
           reinterpret_cast<std::uintptr_t>(f.planes) % 16 == 0 && f.channels % 8 == 0 && is_width(f.channels) &&
           is_width(f.hidden) && is_width(f.outputs) && f.depth >= 1 && f.height >= 1 && f.width >= 1 &&
           scene_extent(f, 1) < std::int64_t(1) << 31;
}

FieldShape shape_of(const Field& f, const CudaOptions& options, int capacity, int tile) {
    FieldShape s{};
    s.channels = int(f.channels), s.hidden = int(f.hidden), s.outputs = int(f.outputs);
    s.channels_padded = int(round_up(f.channels, MatrixTile<16>::kColumns));
    s.hidden_padded = int(round_up(f.hidden, MatrixTile<32>::kColumns));
    s.outputs_padded = int(round_up(f.outputs, MatrixTile<16>::kColumns));
    s.feature_stride = s.channels_padded + kRowPadding;
    s.hidden_stride = s.hidden_padded + kRowPadding;
    s.color_stride = s.outputs_padded + kRowPadding;
    s.capacity = int(round_up(capacity, 4)), s.tile = int(round_up(std::min(tile, capacity), 4));
    s.sizes[0] = int(f.width), s.sizes[1] = int(f.height), s.sizes[2] = int(f.depth);
    s.strides[0] = int(f.column_stride), s.strides[1] = int(f.row_stride), s.strides[2] = int(f.depth_stride);
    s.box_scale = float(f.box_scale);
    s.activation = int(f.activation), s.representation = int(f.representation), s.texel_type = int(options.texel_type);
    with_representation<float>(f.representation, [&]<class R>() {
        static_assert(R::kNumPlanes <= kMaxPlanes && R::kDims <= kMaxDims);
        s.planes = R::kNumPlanes, s.dims = R::kDims, s.coordinates = R::kNumCoordinates, s.factors = R::kNumWeights;
        for (int p = 0; p < R::kNumPlanes; ++p) {
            s.group[p] = R::group(p);
            for (int d = 0; d < R::kDims; ++d) s.axis[p][d] = R::axis(p, d);
        }
    });
    return s;
}

// Bytes of every buffer.
void size_buffers(const FieldTask& task, std::int64_t ray_numbers, std::int64_t (&bytes)[kNumBuffers]) {
    const FieldShape& s = task.shape;
    const auto set = [&](Buffer buffer, std::int64_t numbers) { bytes[buffer] = round_up(4 * numbers, 16); };
    const std::int64_t axes = std::int64_t(s.planes) * s.dims * s.tile, capacity = s.capacity;
    set(kScratch, kThreads);
    for (Buffer b : {kPointX, kPointY, kPointZ, kPointSigma, kPointWeight}) set(b, capacity);
    set(kCoordinates, s.coordinates * capacity), set(kFactors, s.factors * capacity);
    set(kRayNumbers, ray_numbers);
    for (Buffer b : {kHiddenBias, kSigmaWeight, kComposited}) set(b, s.hidden_padded);
    set(kColorBias, s.outputs_padded);
    set(kFeatures, (task.backward ? capacity : s.tile) * s.feature_stride);
    set(kHiddenWeightT, std::int64_t(s.channels) * s.hidden_padded);
    set(kHidden, capacity * s.hidden_stride);
    if (task.reads_colors) set(kColorWeightT, std::int64_t(s.hidden) * s.outputs_padded);
    const std::int64_t of_warps = std::int64_t(kWarps) * s.outputs_padded;
    if (!task.backward) {
        set(kTaps, std::max(4 * axes, of_warps));
        return;
    }
    const std::int64_t taps = (4 + 2) * axes + std::int64_t(s.planes) * (s.dims + 1) * s.tile;
    set(kTaps, task.reads_colors ? std::max(taps, capacity * s.color_stride) : taps);
    set(kQuery, s.hidden_padded), set(kColorGradient, s.outputs_padded);
    set(kHiddenWeight, std::int64_t(s.hidden) * s.channels_padded);
    set(kColorWeight, std::int64_t(s.outputs_padded) * s.hidden_padded);
    if (task.want_sums) set(kSums, DecoderSums::of(s).size);
}

struct DeviceLimits {
    int shared_per_block, shared_per_processor, processors;
};

// Everything in shared memory where that is possible; otherwise the first buffers, and room for a second block.
bool make_plan(const std::int64_t (&bytes)[kNumBuffers], const DeviceLimits& limits, MemoryPlan& plan) {
    std::int64_t total = 0;
    for (std::int64_t size : bytes) total += size;
    const std::int64_t for_two = limits.shared_per_processor / 2 - 1024;
    const std::int64_t budget =
        total <= limits.shared_per_block ? total : std::min<std::int64_t>(limits.shared_per_block, for_two);
    std::int64_t shared = 0, global = 0;
    plan = {};
    for (int b = 0; b < kNumBuffers; ++b) {
        const bool fits = shared + bytes[b] <= budget;
        std::int64_t& used = fits ? shared : global;
        if (used > std::int64_t(0x7fffffff) - bytes[b]) return false;
        plan.offset[b] = int(used);
        plan.shared_mask |= unsigned(fits) << b;
        used += bytes[b];
    }
    plan.shared_bytes = int(shared), plan.global_bytes = int(round_up(global, 256));
    return plan.global_bytes >= 0;
}

// What a call launches.
template <class Task>
struct Launch {
    using Kernel = void (*)(Task);
    Kernel kernel;
    int blocks;
    std::int64_t block_bytes, sums_bytes, fixed_count;  // of the workspace

    std::int64_t workspace_bytes() const { return kHeaderBytes + sums_bytes + block_bytes + 8 * fixed_count; }
};

#define SPHEREHEAD_TRY(call)                                          \
    do {                                                              \
        if (const cudaError_t e = (call); e != cudaSuccess) return e; \
    } while (false)

// Makes a device the current one for a while.
class DeviceScope {
  public:
    explicit DeviceScope(int device) {
        error = cudaGetDevice(&before_);
        if (error == cudaSuccess && before_ != device) error = cudaSetDevice(device);
    }
    ~DeviceScope() {
        if (before_ >= 0) cudaSetDevice(before_);
    }
    DeviceScope(const DeviceScope&) = delete;
    DeviceScope& operator=(const DeviceScope&) = delete;
    cudaError_t error;

  private:
    int before_ = -1;
};

cudaError_t find_limits(int device, DeviceLimits& limits) {
    SPHEREHEAD_TRY(cudaDeviceGetAttribute(&limits.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    SPHEREHEAD_TRY(
        cudaDeviceGetAttribute(&limits.shared_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
    return cudaDeviceGetAttribute(&limits.processors, cudaDevAttrMultiProcessorCount, device);
}

int bits_for(std::int64_t count) {
    int bits = 0;
    while (std::int64_t(1) << bits < count) ++bits;
    return bits;
}

// Completes the field of a task, whose shape and wishes are set, for `units` rays or tiles.
template <class Task>
cudaError_t prepare(FieldTask& field, std::int64_t ray_numbers, std::int64_t units, const CudaOptions& options,
                    typename Launch<Task>::Kernel all_shared, typename Launch<Task>::Kernel mixed,
                    Launch<Task>& launch) {
    DeviceLimits limits;
    SPHEREHEAD_TRY(find_limits(int(options.device), limits));
    std::int64_t bytes[kNumBuffers] = {};
    size_buffers(field, ray_numbers, bytes);
    if (!make_plan(bytes, limits, field.plan)) return cudaErrorInvalidValue;
    const MemoryPlan& plan = field.plan;
    launch.kernel = plan.all_shared() ? all_shared : mixed;
    // The limit, not what is needed: a call of another thread may come between this line and the launch.
    SPHEREHEAD_TRY(
        cudaFuncSetAttribute(launch.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_per_block));
    int per_processor = 0;
    SPHEREHEAD_TRY(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, launch.kernel, kThreads, plan.shared_bytes));
    std::int64_t blocks = std::min(units, std::int64_t(std::max(per_processor, 1)) * limits.processors);
    if (plan.global_bytes > 0)
        blocks = std::min(blocks, std::max<std::int64_t>(1, kMaxGlobalBytes / plan.global_bytes));
    launch.blocks = int(blocks);
    launch.block_bytes = blocks * plan.global_bytes;
    launch.sums_bytes = field.want_sums ? round_up(4 * blocks * DecoderSums::of(field.shape).size, 256) : 0;
    const bool fixed = field.planes == kFindLargest;
    launch.fixed_count = fixed ? scene_extent(field.field, field.shape.planes) : 0;

    char* const workspace = static_cast<char*>(options.workspace);
    field.largest = reinterpret_cast<int*>(workspace);
    field.sums = reinterpret_cast<float*>(workspace + kHeaderBytes);
    field.workspace = workspace + kHeaderBytes + launch.sums_bytes;
    field.fixed_sums = reinterpret_cast<long long*>(field.workspace + launch.block_bytes);
    return cudaSuccess;
}

template <class Task>
cudaError_t start(const Launch<Task>& launch, const Task& task, const FieldTask& field, cudaStream_t stream) {
    SPHEREHEAD_LAUNCH(launch.kernel, unsigned(launch.blocks), kThreads, field.plan.shared_bytes, stream, task);
    return cudaGetLastError();
}

// Runs the backward pass of a task; select(task, scene) limits it to one scene.
template <class Task, class Select>
cudaError_t run_backward(const Launch<Task>& launch, const Task& task, FieldTask Task::*of_task,
                         const FieldGradients& gradients, cudaStream_t stream, const Select& select) {
    const FieldTask& field = task.*of_task;
    if (field.planes == kFindLargest) SPHEREHEAD_TRY(cudaMemsetAsync(field.largest, 0, sizeof(int), stream));
    SPHEREHEAD_TRY(start(launch, task, field, stream));
    if (field.want_sums) {
        const unsigned grid = unsigned(DecoderSums::of(field.shape).size / kThreads + 1);
        SPHEREHEAD_LAUNCH(add_sums_kernel, grid, kThreads, 0, stream, field, gradients, launch.blocks);
        SPHEREHEAD_TRY(cudaGetLastError());
    }
    for (std::int64_t scene = 0; field.planes == kFindLargest && scene < field.field.scenes; ++scene) {
        const Task second = select(task, scene);
        const FieldTask& of_scene = second.*of_task;
        SPHEREHEAD_TRY(cudaMemsetAsync(field.fixed_sums, 0, 8 * launch.fixed_count, stream));
        SPHEREHEAD_TRY(start(launch, second, of_scene, stream));
        const unsigned grid = unsigned(std::min<std::int64_t>((launch.fixed_count + kThreads - 1) / kThreads, 4096));
        SPHEREHEAD_LAUNCH(add_fixed_kernel, grid, kThreads, 0, stream, of_scene,
                          field.plane_gradients + scene * field.field.scene_stride, launch.fixed_count);
        SPHEREHEAD_TRY(cudaGetLastError());
    }
    return cudaSuccess;
}

// Of the second pass of the deterministic mode.
void keep_planes_only(FieldTask& field) {
    field.planes = kAddFixed;
    field.want_sums = field.want_positions = false;
}

void describe_gradients(FieldTask& field, const FieldGradients& gradients, bool positions, std::int64_t contributions,
                        const CudaOptions& options) {
    field.backward = true;
    field.want_sums = gradients.hidden_weight != nullptr;
    field.want_positions = positions;
    field.plane_gradients = static_cast<float*>(gradients.planes);
    field.planes = gradients.planes == nullptr ? kLeaveOut : options.deterministic ? kFindLargest : kAddFloats;
    field.contribution_bits = bits_for(contributions);
}

bool is_aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

template <class Task>
bool has_workspace(const Launch<Task>& launch, const CudaOptions& options) {
    return options.workspace_bytes >= launch.workspace_bytes() && is_aligned(options.workspace);
}

cudaStream_t stream_of(const CudaOptions& options) { return static_cast<cudaStream_t>(options.stream); }

}  // namespace
}  // namespace spherehead::SPHEREHEAD_ISA
