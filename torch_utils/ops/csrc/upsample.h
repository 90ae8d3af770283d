// Images twice as large through a 4x4 filter, and a bias.
#pragma once

#include <cstdint>

namespace spherehead {

struct Upsample {
    const float* x;     // [B, H, W, C], zeros around it
    const float* fir;   // [4, 4], an outer product
    const float* bias;  // [C], or null
    float* out;         // [B, 2 H, 2 W, C]
    std::int64_t batch, height, width, channels;
};

}  // namespace spherehead
