// 3x3 convolution of channels-last images by Winograd's method, joined with what surrounds it in a StyleGAN2 layer.
//
// A task takes a block of tiles through three stages, in memory of its thread that stays in the caches: transform the
// input windows to V [36][tiles][I]; multiply by the transformed weights, M[p] = V[p] U[p], 36 matrix products;
// transform M [36][tiles][O] to outputs. Factors of channels, noise, bias and activation ride along.
// Every product is summed over the input channels in their order, so results do not depend on threads or blocks.
#include "winograd_cpu.h"

namespace spherehead::SPHEREHEAD_ISA {
namespace {

constexpr int kWindow = Same::kWindow;
constexpr std::int64_t kSlice = 128;  // columns multiplied before their outputs are finished
constexpr std::int64_t kManyWeights = 100'000;  // per point; more do not stay in a second-level cache

// Sizes that follow from a convolution.
struct Plan {
    explicit Plan(const WinogradConv& conv)
        : tiles_y((conv.height + kTile - 1) / kTile),
          tiles_x((conv.width + kTile - 1) / kTile),
          tiles(conv.batch * tiles_y * tiles_x),
          block(tiles_of_block(tiles, conv.threads, conv.in_channels * conv.out_channels)),
          blocks((tiles + block - 1) / block),
          columns(columns_of_task(conv, blocks)),
          tasks(blocks * ((conv.out_channels + columns - 1) / columns)),
          v_row(conv.in_channels + kPad),
          v_point(block * v_row + kPad),
          m_row(kSlice + kPad),
          m_point(block * m_row + kPad) {}

    // A block reads all weights: the more of them, the more tiles should share that. Every thread gets as many blocks.
    static std::int64_t tiles_of_block(std::int64_t tiles, std::int64_t threads, std::int64_t weights) {
        const std::int64_t most = weights > kManyWeights ? 96 : 48;
        const std::int64_t rounds = (tiles + threads * most - 1) / (threads * most);
        const std::int64_t even = (tiles + threads * rounds - 1) / (threads * rounds);
        return round_up(std::max<std::int64_t>(std::min<std::int64_t>(tiles, 16), even), kRows);
    }

    std::int64_t floats(std::int64_t in_channels) const { return kPoints * (v_point + m_point) + in_channels; }

    std::int64_t tiles_y, tiles_x, tiles;
    std::int64_t block, blocks;                   // tiles of a block, and their number
    std::int64_t columns, tasks;                  // output channels of a task, and the number of tasks
    std::int64_t v_row, v_point, m_row, m_point;  // floats from row to row and from point to point of V and M
};

struct Tile {
    Tile(const Plan& plan, std::int64_t index)
        : image(index / (plan.tiles_y * plan.tiles_x)),
          y(index / plan.tiles_x % plan.tiles_y * kTile),
          x(index % plan.tiles_x * kTile) {}

    std::int64_t image, y, x;  // which image, and the first output row and column
};

// Transforms the window of a tile, all channels, to v[point * plan.v_point + channel].
void transform_window(const WinogradConv& conv, const Plan& plan, const Tile& tile, const float* zeros, float* v) {
    const float* window[kWindow][kWindow];
    for (int i = 0; i < kWindow; ++i) {
        for (int j = 0; j < kWindow; ++j) {
            const std::int64_t y = tile.y + i - 1, x = tile.x + j - 1;
            const bool inside = y >= 0 && y < conv.height && x >= 0 && x < conv.width;
            const std::int64_t pixel = (tile.image * conv.height + y) * conv.width + x;
            window[i][j] = inside ? conv.x + pixel * conv.in_channels : zeros;
        }
    }
    const float* styles = conv.styles ? conv.styles + tile.image * conv.in_channels : nullptr;
    for (std::int64_t c = 0; c < conv.in_channels; c += kGroup) {
        Group columns[kWindow][kWindow];  // transformed along y, by x
        SPHEREHEAD_UNROLL for (int j = 0; j < kWindow; ++j) {
            Group d[kWindow];
            SPHEREHEAD_UNROLL for (int i = 0; i < kWindow; ++i) load(d[i], window[i][j] + c);
            Same::transform_input(d, columns[j]);
        }
        Group style = Group{} + 1.0F;
        if (styles) load(style, styles + c);
        SPHEREHEAD_UNROLL for (int i = 0; i < kWindow; ++i) {
            Group d[kWindow], row[kWindow];
            SPHEREHEAD_UNROLL for (int j = 0; j < kWindow; ++j) d[j] = columns[j][i] * style;
            Same::transform_input(d, row);
            SPHEREHEAD_UNROLL for (int j = 0; j < kWindow; ++j) {
                store(v + (i * kWindow + j) * plan.v_point + c, row[j]);
            }
        }
    }
}

// Transforms the products m[point * plan.m_point] of 8 channels of a tile.
inline void transform_products(const Plan& plan, const float* m, Group (&y)[kTile][kTile]) {
    Group columns[kWindow][kTile];  // transformed along y, by x
    SPHEREHEAD_UNROLL for (int j = 0; j < kWindow; ++j) {
        Group d[kWindow];
        SPHEREHEAD_UNROLL for (int i = 0; i < kWindow; ++i) load(d[i], m + (i * kWindow + j) * plan.m_point);
        Same::transform_output(d, columns[j]);
    }
    SPHEREHEAD_UNROLL for (int i = 0; i < kTile; ++i) {
        Group d[kWindow];
        SPHEREHEAD_UNROLL for (int j = 0; j < kWindow; ++j) d[j] = columns[j][i];
        Same::transform_output(d, y[i]);
    }
}

// Writes the outputs of a tile for the channels [begin, end), of which m holds the products.
void finish_tile(const WinogradConv& conv, const Plan& plan, const Tile& tile, std::int64_t begin, std::int64_t end,
                 const float* m) {
    const auto rows = std::min<std::int64_t>(kTile, conv.height - tile.y);
    const auto columns = std::min<std::int64_t>(kTile, conv.width - tile.x);
    const float* noise = conv.noise ? conv.noise + tile.image * conv.noise_stride : nullptr;
    float* out = conv.out + tile.image * conv.height * conv.width * conv.out_channels;
    for (std::int64_t c = begin; c < end; c += kGroup) {
        Group y[kTile][kTile];
        transform_products(plan, m + c - begin, y);
        const Tail tail(conv, tile.image, c);
        for (std::int64_t i = 0; i < rows; ++i) {
            for (std::int64_t j = 0; j < columns; ++j) {
                const std::int64_t pixel = (tile.y + i) * conv.width + tile.x + j;
                tail.finish(conv, y[i][j], noise ? noise + pixel : nullptr, out + pixel * conv.out_channels + c);
            }
        }
    }
}

void convolve_block(const WinogradConv& conv, const Plan& plan, std::int64_t task, float* scratch) {
    const std::int64_t first = task % plan.blocks * plan.block, first_column = task / plan.blocks * plan.columns;
    const std::int64_t tiles = std::min(plan.block, plan.tiles - first);
    const std::int64_t end_column = std::min(conv.out_channels, first_column + plan.columns);
    float* v = scratch;
    float* m = v + kPoints * plan.v_point;
    float* zeros = m + kPoints * plan.m_point;
    std::fill_n(zeros, conv.in_channels, 0.0F);
    for (std::int64_t t = 0; t < tiles; ++t) {
        transform_window(conv, plan, Tile(plan, first + t), zeros, v + t * plan.v_row);
    }
    const std::int64_t u_point = round_up(conv.out_channels, kPanel) * conv.in_channels;
    for (std::int64_t begin = first_column; begin < end_column; begin += kSlice) {
        const std::int64_t end = std::min(end_column, begin + kSlice);
        for (int point = 0; point < kPoints; ++point) {
            const float* u = conv.packed + point * u_point + begin * conv.in_channels;
            multiply(v + point * plan.v_point, plan.v_row, tiles, u, conv.in_channels, end - begin,
                     m + point * plan.m_point, plan.m_row);
        }
        for (std::int64_t t = 0; t < tiles; ++t) {
            finish_tile(conv, plan, Tile(plan, first + t), begin, end, m + t * plan.m_row);
        }
    }
}

}  // namespace
}  // namespace spherehead::SPHEREHEAD_ISA

// Returns how many floats winograd_pack and winograd_up_pack write.
SPHEREHEAD_EXPORT(std::int64_t, winograd_packed_size)(std::int64_t in_channels, std::int64_t out_channels) {
    using namespace spherehead::SPHEREHEAD_ISA;
    return spherehead::kPoints * in_channels * round_up(out_channels, kPanel);
}

// Transforms weights [O, I, 3, 3] to the layout that winograd_conv reads.
SPHEREHEAD_EXPORT(int, winograd_pack)
(const float* weight, std::int64_t in_channels, std::int64_t out_channels, float* packed) {
    spherehead::SPHEREHEAD_ISA::pack<spherehead::Same>(weight, in_channels, out_channels, packed);
    return 0;
}

// Convolves; returns 1 where memory is short.
SPHEREHEAD_EXPORT(int, winograd_conv)(const spherehead::WinogradConv* conv) {
    using namespace spherehead::SPHEREHEAD_ISA;
    const Plan plan(*conv);
    return run_with_scratch(plan.tasks, plan.floats(conv->in_channels), [&](std::int64_t task, float* scratch) {
        convolve_block(*conv, plan, task, scratch);
    });
}
