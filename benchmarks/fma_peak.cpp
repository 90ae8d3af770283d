// Prints the fused multiply-adds that one thread reaches with everything in registers, in GFLOP/s (two per element).
#include <chrono>
#include <cstdio>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

#if defined(__x86_64__)
#define IN_REGISTER(x) asm volatile("" : "+x"(x))  // keeps the compiler from joining steps and from using memory
#else
#define IN_REGISTER(x) asm volatile("" : "+w"(x))
#endif
#define STEP(x) x = x * factor + summand; IN_REGISTER(x);

int main() {
    constexpr int kSums = 10, kSteps = 200'000, kRepeats = 25;  // ten independent sums hide the latency
    Lanes factor = Lanes{} + 0.999F, summand = Lanes{} + 1e-5F;
    Lanes a = factor, b = a, c = a, d = a, e = a, f = a, g = a, h = a, i = a, j = a;
    IN_REGISTER(factor);
    IN_REGISTER(summand);
    double best_s = 1e9;
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
        const auto start = std::chrono::steady_clock::now();
        for (int step = 0; step < kSteps; ++step) {
            STEP(a) STEP(b) STEP(c) STEP(d) STEP(e) STEP(f) STEP(g) STEP(h) STEP(i) STEP(j)
        }
        const std::chrono::duration<double> s = std::chrono::steady_clock::now() - start;
        if (s.count() < best_s) best_s = s.count();
    }
    std::printf("%.1f\n", 2.0 * kLanes * kSums * kSteps / best_s / 1e9);
}
