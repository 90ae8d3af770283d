// Upsampling of channels-last images by two, without the zeros between their pixels: along an axis, output 2 i takes two
// taps at the pixels i - 1 and i, and output 2 i + 1 the other two at the pixels i and i + 1.
#include "upsample.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <vector>

#include "export.h"
#include "parallel.h"

namespace {

using spherehead::Upsample;

constexpr int kTaps = 4;
constexpr float kGain = 4;                    // a quarter of the zero-stuffed pixels are not zero
constexpr std::int64_t kStripFloats = 4096;   // of a row of a strip, 16 KiB
constexpr std::int64_t kTaskFloats = 1 << 17;  // written by a task, roughly

struct Taps {
    float y[kTaps], x[kTaps];
};

// Splits the filter into an outer product; returns whether it is one, up to rounding.
bool split_filter(const float* fir, Taps& taps) {
    const auto smaller = [](float a, float b) { return std::abs(a) < std::abs(b); };
    const int peak = int(std::max_element(fir, fir + kTaps * kTaps, smaller) - fir);
    const double largest = fir[peak];
    double rest = 0;
    for (int i = 0; i < kTaps; ++i) {
        const double y = fir[i * kTaps + peak % kTaps];
        for (int j = 0; j < kTaps; ++j) {
            const double x = largest == 0 ? 0 : fir[peak / kTaps * kTaps + j] / largest;
            rest = std::max(rest, std::abs(y * x - fir[i * kTaps + j]));
            taps.x[j] = float(x);
        }
        taps.y[i] = float(kGain * y);
    }
    return rest <= 1e-6 * std::abs(largest);
}

// buffer = before * a + after * b, between zeros for pixels outside the image.
void mix_rows(float before, const float* a, float after, const float* b, std::int64_t left, std::int64_t count,
              std::int64_t right, float* __restrict buffer) {
    std::fill_n(buffer, left, 0.0F);
    for (std::int64_t i = 0; i < count; ++i) buffer[left + i] = before * a[i] + after * b[i];
    std::fill_n(buffer + left + count, right, 0.0F);
}

// Two pixels of the result from three of the buffer.
void write_pixels(const float* __restrict buffer, const Taps& taps, const float* __restrict bias, std::int64_t n,
                  float* __restrict out) {
    for (std::int64_t c = 0; c < n; ++c) out[c] = taps.x[3] * buffer[c] + taps.x[1] * buffer[c + n] + bias[c];
    for (std::int64_t c = 0; c < n; ++c)
        out[c + n] = taps.x[2] * buffer[c + n] + taps.x[0] * buffer[c + 2 * n] + bias[c];
}

// The rows 2 * begin to 2 * end of a result, in strips of columns that fit into the first-level cache.
void upsample_rows(const Upsample& p, const Taps& taps, const float* bias, const float* zeros, std::int64_t image,
                   std::int64_t begin, std::int64_t end, std::vector<float>& buffer) {
    const std::int64_t n = p.channels, row_floats = p.width * n;
    const std::int64_t strip = std::max<std::int64_t>(kStripFloats / n - 2, 4);
    buffer.resize((strip + 2) * n);
    const float* x = p.x + image * p.height * row_floats;
    float* out = p.out + 4 * image * p.height * row_floats;
    for (std::int64_t first = 0; first < p.width; first += strip) {
        const std::int64_t last = std::min(first + strip, p.width);
        const std::int64_t left = std::max<std::int64_t>(first - 1, 0), right = std::min(last + 1, p.width);
        const auto row = [&](std::int64_t y) { return y < 0 || y >= p.height ? zeros : x + y * row_floats + left * n; };
        for (std::int64_t y = 2 * begin; y < 2 * end; ++y) {
            const std::int64_t j = y / 2;
            const bool odd = y % 2;
            mix_rows(taps.y[odd ? 2 : 3], row(odd ? j : j - 1), taps.y[odd ? 0 : 1], row(odd ? j + 1 : j),
                     (left - first + 1) * n, (right - left) * n, (last + 1 - right) * n, buffer.data());
            for (std::int64_t i = first; i < last; ++i)
                write_pixels(buffer.data() + (i - first) * n, taps, bias, n, out + (y * p.width + i) * 2 * n);
        }
    }
}

}  // namespace

// Returns 0, 1 where memory is short, 2 where the filter is no outer product.
SPHEREHEAD_EXPORT(int, upsample)(const Upsample* upsample) {
    const Upsample& p = *upsample;
    Taps taps;
    if (!split_filter(p.fir, taps)) return 2;
    if (p.batch * p.height * p.width * p.channels == 0) return 0;
    std::atomic<int> status{0};
    try {
        const std::vector<float> zeros(std::max(kStripFloats, 6 * p.channels));  // a row, and no bias
        const std::int64_t rows = std::max<std::int64_t>(1, kTaskFloats / (4 * p.width * p.channels));
        const std::int64_t tasks = (p.height + rows - 1) / rows;
        spherehead::parallel_for(p.batch * tasks, [&](std::int64_t task) {
            static thread_local std::vector<float> buffer;
            try {
                const std::int64_t begin = task % tasks * rows;
                upsample_rows(p, taps, p.bias ? p.bias : zeros.data(), zeros.data(), task / tasks, begin,
                              std::min(begin + rows, p.height), buffer);
            } catch (const std::bad_alloc&) {
                status = 1;
            }
        });
    } catch (const std::bad_alloc&) {
        status = 1;
    }
    return status;
}
