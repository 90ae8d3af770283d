// Volume rendering on a GPU.
//
// A block of 256 threads traces a ray from beginning to end: coarse samples, importance samples, marching, compositing.
// The backward pass traces it again, so that memory is that of planes and rays. Blocks take rays in turn and keep the
// decoder in shared memory; each sums its gradients of the decoder, and the sums are added in the order of blocks.
// Gradients of planes are added by atomic instructions: of floats, in whatever order blocks arrive, or in the
// deterministic mode of 64-bit integers, after a first pass that finds their unit.
//
// Compute capability 7.0 is enough; 9.0 adds four floats at a time. All numbers are float32, planes also float16 or
// bfloat16. No launcher waits for the device.
#include "launch_cuda.cuh"
#include "ray_cuda.cuh"

namespace spherehead::SPHEREHEAD_ISA {
namespace {

constexpr int kRayTile = 64, kRayTileBackward = 32;  // smaller where more else is kept

template <bool kAllShared>
__global__ void __launch_bounds__(kThreads, 2) render_kernel(const __grid_constant__ RenderTask task) {
    SPHEREHEAD_DYNAMIC_SHARED(shared);
    const RayBlock<kAllShared> block(task, shared);
    block.load_decoder();
    for (std::int64_t ray = task.first_ray + blockIdx.x; ray < task.end_ray; ray += gridDim.x) block.forward(ray);
}

template <bool kAllShared>
__global__ void __launch_bounds__(kThreads, 2) render_backward_kernel(const __grid_constant__ RenderTask task) {
    SPHEREHEAD_DYNAMIC_SHARED(shared);
    const RayBlock<kAllShared> block(task, shared);
    block.load_decoder();
    for (std::int64_t ray = task.first_ray + blockIdx.x; ray < task.end_ray; ray += gridDim.x) block.backward(ray);
    block.store_sums();
}

// `gradients` is null for the forward pass.
cudaError_t plan_render(const Field& field, const Rays& rays, const RenderGradients* gradients,
                        const CudaOptions& options, RenderTask& task, Launch<RenderTask>& launch) {
    const std::int64_t samples = rays.coarse + rays.fine;
    if (!is_supported(field, options) || rays.coarse < (rays.fine > 0 ? 4 : 2) || rays.fine < 0 || samples > 1 << 15)
        return cudaErrorInvalidValue;
    task = {};
    task.field.field = field;
    task.field.shape = shape_of(field, options, int(samples), gradients ? kRayTileBackward : kRayTile);
    if (task.field.shape.planes == 0) return cudaErrorInvalidValue;  // an unknown representation
    task.field.reads_colors = gradients == nullptr || field.activation != kNoActivation;
    task.rays = rays;
    task.coarse = int(rays.coarse), task.samples = int(samples);
    task.stride = int(round_up(std::max<std::int64_t>(samples, kWarps), 4));
    task.crop_limit = float(rays.crop_limit), task.density_noise = float(rays.density_noise);
    task.end_ray = field.scenes * rays.rays;
    if (gradients != nullptr) {
        if (!is_aligned(gradients->field.planes)) return cudaErrorInvalidValue;
        task.gradients = *gradients;
        describe_gradients(task.field, gradients->field, gradients->origins != nullptr, rays.rays * samples, options);
    }
    const std::int64_t numbers = std::int64_t(kNumRayNumbers) * task.stride;
    return gradients
               ? prepare(task.field, numbers, task.end_ray, options, render_backward_kernel<true>,
                         render_backward_kernel<false>, launch)
               : prepare(task.field, numbers, task.end_ray, options, render_kernel<true>, render_kernel<false>, launch);
}

}  // namespace
}  // namespace spherehead::SPHEREHEAD_ISA

// All return a cudaError_t: 0 is success, 1 (invalid value) also means a shape that has no kernel, planes that are not
// aligned to 16 bytes (pointer and strides), or too small a workspace.

using namespace spherehead;
using namespace spherehead::SPHEREHEAD_ISA;

// Bytes that volume_render_cuda (gradients null) or volume_render_backward_cuda needs in its workspace.
extern "C" int volume_render_workspace_cuda(const Field* field, const Rays* rays, const RenderGradients* gradients,
                                            const CudaOptions* options, std::int64_t* bytes) {
    *bytes = kHeaderBytes;
    if (field->scenes * rays->rays == 0) return cudaSuccess;
    const DeviceScope device(int(options->device));
    SPHEREHEAD_TRY(device.error);
    RenderTask task;
    Launch<RenderTask> launch;
    SPHEREHEAD_TRY(plan_render(*field, *rays, gradients, *options, task, launch));
    *bytes = launch.workspace_bytes();
    return cudaSuccess;
}

extern "C" int volume_render_cuda(const Field* field, const Rays* rays, const RenderOutputs* outputs,
                                  const CudaOptions* options) {
    if (field->scenes * rays->rays == 0) return cudaSuccess;
    const DeviceScope device(int(options->device));
    SPHEREHEAD_TRY(device.error);
    RenderTask task;
    Launch<RenderTask> launch;
    SPHEREHEAD_TRY(plan_render(*field, *rays, nullptr, *options, task, launch));
    if (!has_workspace(launch, *options)) return cudaErrorInvalidValue;
    task.outputs = *outputs;
    return start(launch, task, task.field, stream_of(*options));
}

extern "C" int volume_render_backward_cuda(const Field* field, const Rays* rays, const RenderGradients* gradients,
                                           const CudaOptions* options) {
    if (field->scenes * rays->rays == 0) return cudaSuccess;
    const DeviceScope device(int(options->device));
    SPHEREHEAD_TRY(device.error);
    RenderTask task;
    Launch<RenderTask> launch;
    SPHEREHEAD_TRY(plan_render(*field, *rays, gradients, *options, task, launch));
    if (!has_workspace(launch, *options)) return cudaErrorInvalidValue;
    const auto select = [](RenderTask second, std::int64_t scene) {
        keep_planes_only(second.field);
        second.first_ray = scene * second.rays.rays, second.end_ray = second.first_ray + second.rays.rays;
        return second;
    };
    return run_backward(launch, task, &RenderTask::field, gradients->field, stream_of(*options), select);
}
