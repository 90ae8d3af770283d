// What a launch tells the blocks that evaluate a field: sizes, where a block keeps what, which gradients are wanted.
#pragma once

#include "block_cuda.cuh"
#include "volume_render.h"

namespace spherehead::SPHEREHEAD_ISA {

enum TexelType : std::int64_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// What becomes of the gradients of planes.
enum PlaneGradients : int {
    kLeaveOut,
    kAddFloats,    // in the order in which blocks arrive
    kFindLargest,  // first pass of the deterministic mode: the scale of fixed-point numbers
    kAddFixed,     // second pass: integers, whose sum does not depend on the order
};

constexpr int kMaxPlanes = 8, kMaxDims = 3;

// A field and a representation in numbers of 32 bits.
struct FieldShape {
    int channels, hidden, outputs;
    int channels_padded, hidden_padded, outputs_padded;  // columns of matrices
    int feature_stride, hidden_stride, color_stride;     // of matrices with one row per point
    int capacity, tile;  // points that are held, and for which planes are looked up at a time
    int planes, dims, coordinates, factors;
    int group[kMaxPlanes], axis[kMaxPlanes][kMaxDims];
    int sizes[kMaxDims], strides[kMaxDims];  // width, height, depth
    float box_scale;
    int activation, representation, texel_type;
};

// The arrays of a block, most wanted in shared memory first. [] are numbers of 4 bytes.
enum Buffer : int {
    kScratch,        // [kThreads]
    kPointX, kPointY, kPointZ, kPointSigma, kPointWeight,  // [capacity]
    kCoordinates,    // [coordinates, capacity]
    kFactors,        // [factors, capacity]
    kRayNumbers,     // by sample; see ray_cuda.cuh
    kHiddenBias, kSigmaWeight, kColorBias, kComposited, kQuery,  // [U'], [U'], [O'], [U'], [U']
    kColorGradient,  // [O']
    kFeatures,       // [capacity or tile, C']
    kTaps,           // [planes, dims, tile] of AxisWeights, slopes, gradients; or, at another time, [capacity, O']
    kHiddenWeightT,  // [C, U']
    kHidden,         // [capacity, U']
    kHiddenWeight,   // [U, C']
    kColorWeight,    // [O', U']
    kColorWeightT,   // [U, O']
    kSums,           // see DecoderSums
    kNumBuffers,
    kPointGradient = kPointSigma,  // in the backward pass
};

// Where they are: offsets in bytes, in shared memory or in the block's part of the workspace.
struct MemoryPlan {
    int offset[kNumBuffers];
    unsigned shared_mask;
    int shared_bytes, global_bytes;
    bool all_shared() const { return global_bytes == 0; }
};

// Gradients of the decoder that a block sums up; offsets in one array.
struct DecoderSums {
    int hidden_weight_t, hidden_bias, sigma_weight, color_weight, color_bias, sigma_bias, size;

    __host__ SPHEREHEAD_DEVICE static DecoderSums of(const FieldShape& s) {
        DecoderSums sums;
        sums.hidden_weight_t = 0;                                                  // [C, U']
        sums.hidden_bias = s.channels * s.hidden_padded;                           // [U']
        sums.sigma_weight = sums.hidden_bias + s.hidden_padded;                    // [U']
        sums.color_weight = sums.sigma_weight + s.hidden_padded;                   // [O', U']
        sums.color_bias = sums.color_weight + s.outputs_padded * s.hidden_padded;  // [O']
        sums.sigma_bias = sums.color_bias + s.outputs_padded;                      // [1]
        sums.size = sums.sigma_bias + 4;
        return sums;
    }
};

struct FieldTask {
    Field field;
    FieldShape shape;
    MemoryPlan plan;
    char* workspace;         // [blocks, plan.global_bytes]
    float* sums;             // [blocks, DecoderSums::size]
    float* plane_gradients;  // of all scenes
    long long* fixed_sums;   // of one scene
    int* largest;            // bits of the largest gradient of a feature
    int contribution_bits;   // no texel receives more than 2^bits gradients
    PlaneGradients planes;
    bool backward, reads_colors, want_sums, want_positions;
};

}  // namespace spherehead::SPHEREHEAD_ISA
