// 3x3 convolution of channels-last images by Winograd's method, joined with what surrounds it in a StyleGAN2 layer.
//
// A task takes a block of tiles through three stages, in memory of its thread that stays in the caches: transform the
// input windows to V [36][tiles][I]; multiply by the transformed weights, M[p] = V[p] U[p], 36 matrix products; transform
// M [36][tiles][O] to outputs. Factors of channels, noise, bias and activation ride along with the transforms.
// Every product is summed over the input channels in their order, so results do not depend on threads or blocks.
#include "winograd.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "export.h"
#include "parallel.h"

namespace spherehead::SPHEREHEAD_ISA {
namespace {

// Outputs of a step of the matrix product: kRows tiles times kVectors vectors of channels, all in registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12, kVectors = 2;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6, kVectors = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 8, kVectors = 3;
#else
constexpr int kLanes = 4, kRows = 6, kVectors = 2;
#endif
constexpr std::int64_t kPanel = kLanes * kVectors;  // channels of a panel of packed weights
constexpr std::int64_t kGroup = 8;                  // channels that the transforms take at a time
constexpr std::int64_t kManyWeights = 100'000;      // per point; more do not stay in a second-level cache
constexpr std::int64_t kPad = 16;                   // floats; keeps rows off the same cache set

template <int kSize>
struct VectorOf {
    typedef float Type __attribute__((vector_size(kSize * sizeof(float))));
};
using Lanes = VectorOf<kLanes>::Type;
using Group = VectorOf<kGroup>::Type;

// Vectors are passed by reference: where registers are narrower than they, passing them by value is not portable.
template <class V>
inline void load(V& v, const float* from) {
    std::memcpy(&v, from, sizeof(V));
}

template <class V>
inline void store(float* to, const V& v) {
    std::memcpy(to, &v, sizeof(V));
}

constexpr std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

// Memory of a thread, kept for the next call.
class Scratch {
public:
    float* reserve(std::int64_t floats) {
        if (floats > size_) {
            size_ = 0;
            memory_.reset(static_cast<float*>(::operator new(floats * sizeof(float), kAlignment)));
            size_ = floats;
        }
        return memory_.get();
    }

private:
    static constexpr std::align_val_t kAlignment{64};
    struct Delete {
        void operator()(float* p) const { ::operator delete(p, kAlignment); }
    };
    std::unique_ptr<float, Delete> memory_;
    std::int64_t size_ = 0;
};

// Sizes that follow from a convolution.
struct Plan {
    explicit Plan(const WinogradConv& conv)
        : tiles_y((conv.height + kTile - 1) / kTile),
          tiles_x((conv.width + kTile - 1) / kTile),
          tiles(conv.batch * tiles_y * tiles_x),
          padded_columns(round_up(conv.up * conv.up * conv.out_channels, kPanel)),
          block(tiles_of_block(tiles, conv.threads, conv.in_channels * padded_columns)),
          v_row(conv.in_channels + kPad),
          v_point(block * v_row + kPad),
          m_row(std::min(padded_columns, kSlice) + kPad),
          m_point(block * m_row + kPad) {}

    static constexpr std::int64_t kSlice = 128 / kPanel * kPanel;  // columns multiplied before their outputs are finished

    // A block reads all weights: the more of them, the more tiles should share that. Every thread gets as many blocks.
    static std::int64_t tiles_of_block(std::int64_t tiles, std::int64_t threads, std::int64_t weights) {
        const std::int64_t most = weights > kManyWeights ? 96 : 48;
        const std::int64_t rounds = (tiles + threads * most - 1) / (threads * most);
        return round_up(std::max<std::int64_t>(1, (tiles + threads * rounds - 1) / (threads * rounds)), kRows);
    }

    std::int64_t floats(std::int64_t in_channels) const { return kPoints * (v_point + m_point) + in_channels; }

    std::int64_t tiles_y, tiles_x, tiles;
    std::int64_t padded_columns;                  // of the weights: outputs, for `up` 2 once per interleaved filter
    std::int64_t block;                           // tiles of a task
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
        for (int j = 0; j < kWindow; ++j) {
            Group d[kWindow];
            for (int i = 0; i < kWindow; ++i) load(d[i], window[i][j] + c);
            transform_input(d, columns[j]);
        }
        Group style = Group{} + 1.0F;
        if (styles) load(style, styles + c);
        for (int i = 0; i < kWindow; ++i) {
            Group d[kWindow], row[kWindow];
            for (int j = 0; j < kWindow; ++j) d[j] = columns[j][i] * style;
            transform_input(d, row);
            for (int j = 0; j < kWindow; ++j) {
                store(v + (i * kWindow + j) * plan.v_point + c, row[j]);
            }
        }
    }
}

// m[row, panel] = sum over i of v[row, i] * u[i, panel], for `rows_` rows.
template <int rows_>
void multiply_step(const float* v, std::int64_t v_row, const float* u, std::int64_t inputs, float* m, std::int64_t m_row) {
    Lanes sums[rows_][kVectors];
#pragma GCC unroll 16
    for (int row = 0; row < rows_; ++row) {
        for (int k = 0; k < kVectors; ++k) sums[row][k] = Lanes{};
    }
    for (std::int64_t i = 0; i < inputs; ++i) {
        Lanes weights[kVectors];
        for (int k = 0; k < kVectors; ++k) load(weights[k], u + i * kPanel + k * kLanes);
#pragma GCC unroll 16
        for (int row = 0; row < rows_; ++row) {
            for (int k = 0; k < kVectors; ++k) sums[row][k] += v[row * v_row + i] * weights[k];
        }
    }
    for (int row = 0; row < rows_; ++row) {
        for (int k = 0; k < kVectors; ++k) store(m + row * m_row + k * kLanes, sums[row][k]);
    }
}

using Step = void (*)(const float*, std::int64_t, const float*, std::int64_t, float*, std::int64_t);

template <int... rows_>
constexpr Step step_of(std::int64_t rows, std::integer_sequence<int, rows_...>) {
    constexpr Step steps[] = {multiply_step<rows_ + 1>...};
    return steps[rows - 1];
}

// M[point] = V[point] U[point] for `tiles` rows and the columns [begin, end), which start and end with a panel.
void multiply(const WinogradConv& conv, const Plan& plan, std::int64_t tiles, std::int64_t begin, std::int64_t end,
              const float* v, float* m) {
    for (int point = 0; point < kPoints; ++point) {
        for (std::int64_t column = begin; column < end; column += kPanel) {
            const float* u = conv.packed + (point * plan.padded_columns + column) * conv.in_channels;
            for (std::int64_t tile = 0; tile < tiles; tile += kRows) {
                const auto rows = std::min<std::int64_t>(kRows, tiles - tile);
                const Step step = step_of(rows, std::make_integer_sequence<int, kRows>{});
                step(v + point * plan.v_point + tile * plan.v_row, plan.v_row, u, conv.in_channels,
                     m + point * plan.m_point + tile * plan.m_row + column - begin, plan.m_row);
            }
        }
    }
}

inline void activate(const WinogradConv& conv, Group& y) {
    y = (y < 0.0F ? y * conv.slope : y) * conv.gain;  // comparisons keep NaN
    y = y > conv.clamp ? Group{} + conv.clamp : y;
    y = y < -conv.clamp ? Group{} - conv.clamp : y;
}

// Transforms the products m[point * plan.m_point] of 8 channels of a tile.
inline void transform_products(const Plan& plan, const float* m, Group (&y)[kTile][kTile]) {
    Group columns[kWindow][kTile];  // transformed along y, by x
    for (int j = 0; j < kWindow; ++j) {
        Group d[kWindow];
        for (int i = 0; i < kWindow; ++i) load(d[i], m + (i * kWindow + j) * plan.m_point);
        transform_output(d, columns[j]);
    }
    for (int i = 0; i < kTile; ++i) {
        Group d[kWindow];
        for (int j = 0; j < kWindow; ++j) d[j] = columns[j][i];
        transform_output(d, y[i]);
    }
}

// Where the outputs of a tile and of one of the interleaved filters lie.
struct Target {
    Target(const WinogradConv& conv, const Tile& tile, std::int64_t phase)
        : rows(std::min<std::int64_t>(kTile, conv.height - tile.y)),
          columns(std::min<std::int64_t>(kTile, conv.width - tile.x)),
          row_stride(conv.up * conv.up * conv.width),
          first((conv.up * tile.y + phase / conv.up) * conv.up * conv.width + conv.up * tile.x + phase % conv.up) {}

    std::int64_t rows, columns;
    std::int64_t row_stride, first;  // in pixels of the output image
};

// Writes the outputs of a tile for the columns [begin, end), of which m holds the products.
void finish_tile(const WinogradConv& conv, const Plan& plan, const Tile& tile, std::int64_t begin, std::int64_t end,
                 const float* m) {
    const std::int64_t out_channels = conv.out_channels;
    const float* noise = conv.noise ? conv.noise + tile.image * conv.noise_stride : nullptr;
    float* out = conv.out + tile.image * conv.up * conv.up * conv.height * conv.width * out_channels;
    for (std::int64_t column = begin; column < end; column += kGroup) {
        const Target target(conv, tile, column / out_channels);
        const std::int64_t c = column % out_channels;
        Group y[kTile][kTile];
        transform_products(plan, m + column - begin, y);
        Group scale = Group{} + 1.0F, bias = {};
        if (conv.scales) load(scale, conv.scales + tile.image * out_channels + c);
        if (conv.bias) load(bias, conv.bias + c);
        for (std::int64_t i = 0; i < target.rows; ++i) {
            for (std::int64_t j = 0; j < target.columns; ++j) {
                const std::int64_t pixel = target.first + i * target.row_stride + conv.up * j;
                Group value = y[i][j] * scale;
                if (noise) value += noise[pixel];
                value += bias;
                activate(conv, value);
                store(out + pixel * out_channels + c, value);
            }
        }
    }
}

void convolve_block(const WinogradConv& conv, const Plan& plan, std::int64_t first, float* scratch) {
    const std::int64_t tiles = std::min(plan.block, plan.tiles - first);
    const std::int64_t columns = conv.up * conv.up * conv.out_channels;
    float* v = scratch;
    float* m = v + kPoints * plan.v_point;
    float* zeros = m + kPoints * plan.m_point;
    std::fill_n(zeros, conv.in_channels, 0.0F);
    for (std::int64_t t = 0; t < tiles; ++t) {
        transform_window(conv, plan, Tile(plan, first + t), zeros, v + t * plan.v_row);
    }
    for (std::int64_t begin = 0; begin < columns; begin += Plan::kSlice) {
        const std::int64_t end = std::min(columns, begin + Plan::kSlice);
        multiply(conv, plan, tiles, begin, end, v, m);
        for (std::int64_t t = 0; t < tiles; ++t) {
            finish_tile(conv, plan, Tile(plan, first + t), begin, end, m + t * plan.m_row);
        }
    }
}

// Transforms the filters of one panel: packed[point][panel][input][channel of the panel].
void pack_panel(const float* weight, std::int64_t inputs, std::int64_t columns, std::int64_t panel, float* packed) {
    const std::int64_t point_stride = round_up(columns, kPanel) * inputs;
    for (std::int64_t i = 0; i < inputs; ++i) {
        for (std::int64_t k = 0; k < kPanel; ++k) {
            const std::int64_t column = panel * kPanel + k;
            double rows[3][kWindow] = {}, filter[3], u[kWindow];
            for (int y = 0; y < 3 && column < columns; ++y) {
                for (int x = 0; x < 3; ++x) filter[x] = weight[((column * inputs + i) * 3 + y) * 3 + x];
                transform_filter(filter, rows[y]);
            }
            for (int x = 0; x < kWindow; ++x) {
                for (int y = 0; y < 3; ++y) filter[y] = rows[y][x];
                transform_filter(filter, u);
                for (int y = 0; y < kWindow; ++y) {
                    packed[(y * kWindow + x) * point_stride + (panel * inputs + i) * kPanel + k] = static_cast<float>(u[y]);
                }
            }
        }
    }
}

}  // namespace
}  // namespace spherehead::SPHEREHEAD_ISA

// Returns how many floats winograd_pack writes.
SPHEREHEAD_EXPORT(std::int64_t, winograd_packed_size)(std::int64_t in_channels, std::int64_t columns) {
    using namespace spherehead::SPHEREHEAD_ISA;
    return spherehead::kPoints * in_channels * round_up(columns, kPanel);
}

// Transforms weights [columns, I, 3, 3] to the layout that winograd_conv reads; columns are outputs, phase by phase.
SPHEREHEAD_EXPORT(int, winograd_pack)
(const float* weight, std::int64_t in_channels, std::int64_t columns, float* packed) {
    using namespace spherehead::SPHEREHEAD_ISA;
    spherehead::parallel_for(round_up(columns, kPanel) / kPanel, [=](std::int64_t panel) {
        pack_panel(weight, in_channels, columns, panel, packed);
    });
    return 0;
}

// Convolves; returns 1 where memory is short.
SPHEREHEAD_EXPORT(int, winograd_conv)(const spherehead::WinogradConv* conv) {
    using namespace spherehead::SPHEREHEAD_ISA;
    const Plan plan(*conv);
    std::atomic<int> status{0};
    spherehead::parallel_for((plan.tiles + plan.block - 1) / plan.block, [&](std::int64_t index) {
        static thread_local Scratch scratch;
        try {
            convolve_block(*conv, plan, index * plan.block, scratch.reserve(plan.floats(conv->in_channels)));
        } catch (const std::bad_alloc&) {
            status = 1;
        }
    });
    return status;
}
