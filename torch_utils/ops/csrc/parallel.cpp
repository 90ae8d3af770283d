// The only native file that includes PyTorch's headers.
#include "parallel.h"

#include <ATen/Parallel.h>

#include <atomic>

namespace spherehead {

void run_tasks(std::int64_t count, Task task, void* context) {
    std::atomic<std::int64_t> next{0};
    // One range per thread; the ranges only count threads, the work is shared out task by task, because tasks differ.
    const std::int64_t threads = at::get_num_threads();
    at::parallel_for(0, threads < count ? threads : count, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t thread = begin; thread < end; ++thread) {
            for (std::int64_t index = next++; index < count; index = next++) task(context, index);
        }
    });
}

std::int64_t num_threads() { return at::get_num_threads(); }

}  // namespace spherehead
