// Upsampling layer of StyleGAN2 on channels-last images: transposed 3x3 convolution with stride 2, 4x4 filter, and what
// surrounds them, in one pass.
//
// The results of the transposed convolution at even and odd rows and columns have 4, 2, 2 and 1 taps, 144 products for
// every tile of 4x4 inputs and pair of channels. By Winograd's method (struct Up) these are 81, which share 36 matrices
// of weights. (With the filter in the weights, four convolutions by F(4, 3) would take 144 again, with 144 matrices.)
//
// A task takes a strip of tile rows of one image, some rows at a time, through four stages in memory of its thread:
// windows to V, products M = V U, M to results T, filter and tail to outputs. An output needs T one before and two
// after it, so that three rows of T are kept for the next tiles; a strip below another computes one more row of tiles.
// Every product is summed over the input channels in their order, so results do not depend on threads or strips.
#include "winograd_cpu.h"

namespace spherehead::SPHEREHEAD_ISA {
namespace {

constexpr int kWindow = Up::kWindow;
constexpr int kTaps = 4;
constexpr int kKept = kTaps - 1;       // rows of T kept
constexpr std::int64_t kSlice = 64;    // columns multiplied before they become results
constexpr std::int64_t kFilterWidth = 16;  // pixels of which T stays in a second-level cache for all rows of a block
constexpr std::int64_t kBlock = 64;    // tiles of a block, at least, where the strip has as many
constexpr std::int64_t kStripRows = 8;  // tile rows of a strip, at least, where the image has as many

// How many products along an axis share the weights of a point.
constexpr int sharing(int point) { return point == kWindow ? kTile : 1; }

// Products of all points before point (y, x), per tile.
constexpr int products_before(int y, int x) { return y * Up::kProducts + sharing(y) * x; }

// Sizes that follow from a convolution. Row n of T is t[n - 1]; an output y takes the rows y .. y + 3.
struct Plan {
    explicit Plan(const WinogradConv& conv)
        : tiles_y((2 * conv.height + kKept + Up::kResults - 1) / Up::kResults),
          tiles_x((2 * conv.width + kKept + Up::kResults - 1) / Up::kResults),
          strips(strips_of_image(tiles_y, conv.threads, conv.batch)),
          strip((tiles_y + strips - 1) / strips),
          columns(columns_of_task(conv, strips * conv.batch)),
          shares((conv.out_channels + columns - 1) / columns),
          block_rows(std::clamp<std::int64_t>(kBlock / tiles_x, 1, strip)),
          v_row(conv.in_channels + kPad),
          t_row(Up::kResults * tiles_x * columns + kPad) {}

    // More strips than threads even out the work, but every strip begins with an extra row of tiles.
    static std::int64_t strips_of_image(std::int64_t tiles_y, std::int64_t threads, std::int64_t batch) {
        const std::int64_t wanted = threads == 1 ? 1 : 2 * threads / batch;
        return std::max<std::int64_t>(1, std::min(tiles_y / kStripRows, wanted));
    }

    std::int64_t products() const { return Up::kProducts * Up::kProducts * block_rows * tiles_x; }
    std::int64_t t_rows() const { return kKept + Up::kResults * block_rows; }
    std::int64_t floats(std::int64_t in_channels) const {
        return products() * (v_row + m_row) + t_rows() * t_row + in_channels;
    }

    static constexpr std::int64_t m_row = kSlice + kPad;
    std::int64_t tiles_y, tiles_x;
    std::int64_t strips, strip;    // per image, and tile rows of each
    std::int64_t columns, shares;  // output channels of a task, and how many tasks share a strip
    std::int64_t block_rows;       // tile rows of a block
    std::int64_t v_row, t_row;     // floats from row to row of V and T
};

// A block of tile rows of an image, and the output channels of the task.
struct Block {
    std::int64_t image, row, rows;  // the first tile row, and how many
    std::int64_t begin, end;        // channels
};

// Where V and M have the rows of a tile: product (sy, sx) of those that share the weights of point (y, x).
inline std::int64_t product_row(int y, int x, int sy, int sx, std::int64_t tiles, std::int64_t tile) {
    return (products_before(y, x) + sy * sharing(x) + sx) * tiles + tile;
}

// Splits an index of Up::kProducts into the point and its place among the products that share it.
constexpr int point_of(int product) { return std::min(product, kWindow); }
constexpr int place_of(int product) { return product - point_of(product); }

// Transforms the window of a tile, all channels, to its rows of V.
void transform_window(const WinogradConv& conv, const Plan& plan, const Block& block, std::int64_t tile,
                      const float* zeros, float* v) {
    const std::int64_t first_y = (block.row + tile / plan.tiles_x) * kTile - 1;
    const std::int64_t first_x = tile % plan.tiles_x * kTile - 1;
    const std::int64_t tiles = block.rows * plan.tiles_x;
    const float* window[kWindow][kWindow];
    for (int i = 0; i < kWindow; ++i) {
        for (int j = 0; j < kWindow; ++j) {
            const std::int64_t y = first_y + i, x = first_x + j;
            const bool inside = y >= 0 && y < conv.height && x >= 0 && x < conv.width;
            const std::int64_t pixel = (block.image * conv.height + y) * conv.width + x;
            window[i][j] = inside ? conv.x + pixel * conv.in_channels : zeros;
        }
    }
    float* rows[Up::kProducts][Up::kProducts];
    for (int y = 0; y < Up::kProducts; ++y) {
        for (int x = 0; x < Up::kProducts; ++x) {
            rows[y][x] = v + product_row(point_of(y), point_of(x), place_of(y), place_of(x), tiles, tile) * plan.v_row;
        }
    }
    const float* styles = conv.styles ? conv.styles + block.image * conv.in_channels : nullptr;
    for (std::int64_t c = 0; c < conv.in_channels; c += kGroup) {
        Group style = Group{} + 1.0F, columns[kWindow][Up::kProducts];  // by x, transformed along y
        if (styles) load(style, styles + c);
        SPHEREHEAD_UNROLL for (int j = 0; j < kWindow; ++j) {
            Group d[kWindow], even[kWindow];
            SPHEREHEAD_UNROLL for (int i = 0; i < kWindow; ++i) {
                load(d[i], window[i][j] + c);
                d[i] *= style;
            }
            Up::transform_input(d, even);
            SPHEREHEAD_UNROLL for (int i = 0; i < kWindow; ++i) columns[j][i] = even[i];
            SPHEREHEAD_UNROLL for (int i = 0; i < kTile; ++i) columns[j][kWindow + i] = d[i];
        }
        SPHEREHEAD_UNROLL for (int y = 0; y < Up::kProducts; ++y) {
            Group d[kWindow], even[kWindow];
            SPHEREHEAD_UNROLL for (int j = 0; j < kWindow; ++j) d[j] = columns[j][y];
            Up::transform_input(d, even);
            SPHEREHEAD_UNROLL for (int j = 0; j < kWindow; ++j) store(rows[y][j] + c, even[j]);
            SPHEREHEAD_UNROLL for (int j = 0; j < kTile; ++j) store(rows[y][kWindow + j] + c, d[j]);
        }
    }
}

// Multiplies V by the weights of the channels [begin, end).
void multiply_points(const WinogradConv& conv, const Plan& plan, std::int64_t tiles, std::int64_t begin,
                     std::int64_t end, const float* v, float* m) {
    const std::int64_t u_point = round_up(conv.out_channels, kPanel) * conv.in_channels;
    for (int y = 0; y < kFilterPoints; ++y) {
        for (int x = 0; x < kFilterPoints; ++x) {
            const std::int64_t row = product_row(y, x, 0, 0, tiles, 0);
            const float* u = conv.packed + (y * kFilterPoints + x) * u_point + begin * conv.in_channels;
            multiply(v + row * plan.v_row, plan.v_row, sharing(y) * sharing(x) * tiles, u, conv.in_channels,
                     end - begin, m + row * plan.m_row, plan.m_row);
        }
    }
}

// Transforms the products of a tile, `count` channels, to t, its corner of T.
void transform_products(const Plan& plan, std::int64_t tiles, std::int64_t tile, std::int64_t count, const float* m,
                        float* t) {
    const float* rows[Up::kProducts][Up::kProducts];
    for (int y = 0; y < Up::kProducts; ++y) {
        for (int x = 0; x < Up::kProducts; ++x) {
            rows[y][x] = m + product_row(point_of(y), point_of(x), place_of(y), place_of(x), tiles, tile) * plan.m_row;
        }
    }
    for (std::int64_t c = 0; c < count; c += kGroup) {
        Group columns[Up::kProducts][Up::kResults];  // by x, transformed along y
        SPHEREHEAD_UNROLL for (int x = 0; x < Up::kProducts; ++x) {
            Group d[Up::kProducts];
            SPHEREHEAD_UNROLL for (int y = 0; y < Up::kProducts; ++y) load(d[y], rows[y][x] + c);
            Up::transform_output(d, columns[x]);
        }
        SPHEREHEAD_UNROLL for (int i = 0; i < Up::kResults; ++i) {
            Group d[Up::kProducts], results[Up::kResults];
            SPHEREHEAD_UNROLL for (int x = 0; x < Up::kProducts; ++x) d[x] = columns[x][i];
            Up::transform_output(d, results);
            SPHEREHEAD_UNROLL for (int j = 0; j < Up::kResults; ++j) {
                store(t + i * plan.t_row + j * plan.columns + c, results[j]);
            }
        }
    }
}

// Filters four rows of T, which begin at t, and writes the pixels [begin, end) of row y of the output.
void filter_row(const WinogradConv& conv, const Plan& plan, const Block& block, std::int64_t y, std::int64_t begin,
                std::int64_t end, const float* t) {
    const std::int64_t width = 2 * conv.width;
    const std::int64_t first_pixel = (block.image * 2 * conv.height + y) * width;
    const float* noise = conv.noise ? conv.noise + block.image * conv.noise_stride + y * width : nullptr;
    for (std::int64_t x = begin; x < end; x += 2) {  // two outputs share most of T
        float* out = conv.out + (first_pixel + x) * conv.out_channels;
        for (std::int64_t c = block.begin; c < block.end; c += kGroup) {
            Group sums[2][kTaps];  // by row of T, because one sum of 16 products would wait for itself
            SPHEREHEAD_UNROLL for (int i = 0; i < kTaps; ++i) {
                const float* taps = conv.fir + (kTaps - 1 - i) * kTaps;
                Group values[kTaps + 1];
                SPHEREHEAD_UNROLL for (int j = 0; j <= kTaps; ++j) {
                    load(values[j], t + i * plan.t_row + (x + j) * plan.columns + c - block.begin);
                }
                SPHEREHEAD_UNROLL for (int k = 0; k < 2; ++k) {
                    sums[k][i] = taps[3] * values[k];
                    SPHEREHEAD_UNROLL for (int j = 1; j < kTaps; ++j) sums[k][i] += taps[3 - j] * values[k + j];
                }
            }
            const Tail tail(conv, block.image, c);
            SPHEREHEAD_UNROLL for (int k = 0; k < 2; ++k) {
                const Group sum = (sums[k][0] + sums[k][1]) + (sums[k][2] + sums[k][3]);
                tail.finish(conv, sum, noise ? noise + x + k : nullptr, out + k * conv.out_channels + c);
            }
        }
    }
}

// Computes T for a block, and the outputs from row `first_y` on that have all their rows of T.
void convolve_block(const WinogradConv& conv, const Plan& plan, const Block& block, std::int64_t first_y,
                    float* scratch) {
    const std::int64_t tiles = block.rows * plan.tiles_x;
    float* v = scratch;
    float* m = v + plan.products() * plan.v_row;
    float* t = m + plan.products() * plan.m_row;
    float* zeros = t + plan.t_rows() * plan.t_row;
    for (std::int64_t tile = 0; tile < tiles; ++tile) transform_window(conv, plan, block, tile, zeros, v);
    for (std::int64_t begin = block.begin; begin < block.end; begin += kSlice) {
        const std::int64_t end = std::min(block.end, begin + kSlice);
        multiply_points(conv, plan, tiles, begin, end, v, m);
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
            const std::int64_t row = kKept + tile / plan.tiles_x * Up::kResults, x = tile % plan.tiles_x * Up::kResults;
            float* corner = t + row * plan.t_row + x * plan.columns + begin - block.begin;
            transform_products(plan, tiles, tile, end - begin, m, corner);
        }
    }
    const std::int64_t t_first = block.row * Up::kResults - kKept, t_end = (block.row + block.rows) * Up::kResults;
    for (std::int64_t x = 0; x < 2 * conv.width; x += kFilterWidth) {
        const std::int64_t end = std::min(2 * conv.width, x + kFilterWidth);
        for (std::int64_t y = std::max(first_y, t_first); y < std::min(2 * conv.height, t_end - kKept); ++y) {
            filter_row(conv, plan, block, y, x, end, t + (y - t_first) * plan.t_row);
        }
    }
    std::memmove(t, t + block.rows * Up::kResults * plan.t_row, kKept * plan.t_row * sizeof(float));
}

void convolve_strip(const WinogradConv& conv, const Plan& plan, std::int64_t task, float* scratch) {
    const std::int64_t share = task % plan.shares, strip = task / plan.shares % plan.strips;
    const std::int64_t first = strip * plan.strip, end = std::min(plan.tiles_y, first + plan.strip);
    const std::int64_t begin_column = share * plan.columns;
    Block block{task / plan.shares / plan.strips, first, 0, begin_column,
                std::min(conv.out_channels, begin_column + plan.columns)};
    std::fill_n(scratch + plan.floats(conv.in_channels) - conv.in_channels, conv.in_channels, 0.0F);
    const std::int64_t first_y = first == 0 ? 0 : first * Up::kResults - kKept;
    if (first > 0 && first < end) {  // the rows of T above the strip
        block.row = first - 1;
        block.rows = 1;
        convolve_block(conv, plan, block, first_y, scratch);
    }
    for (block.row = first; block.row < end; block.row += block.rows) {
        block.rows = std::min(plan.block_rows, end - block.row);
        convolve_block(conv, plan, block, first_y, scratch);
    }
}

}  // namespace
}  // namespace spherehead::SPHEREHEAD_ISA

// Transforms weights [O, I, 3, 3] to the layout that winograd_up_conv reads.
SPHEREHEAD_EXPORT(int, winograd_up_pack)
(const float* weight, std::int64_t in_channels, std::int64_t out_channels, float* packed) {
    spherehead::SPHEREHEAD_ISA::pack<spherehead::Up>(weight, in_channels, out_channels, packed);
    return 0;
}

// Convolves; returns 1 where memory is short.
SPHEREHEAD_EXPORT(int, winograd_up_conv)(const spherehead::WinogradConv* conv) {
    using namespace spherehead::SPHEREHEAD_ISA;
    const Plan plan(*conv);
    const std::int64_t tasks = conv->batch * plan.strips * plan.shares;
    return run_with_scratch(tasks, plan.floats(conv->in_channels), [&](std::int64_t task, float* scratch) {
        convolve_strip(*conv, plan, task, scratch);
    });
}
