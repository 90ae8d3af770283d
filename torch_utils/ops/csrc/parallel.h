// Parallel loops over PyTorch's threads, for files that do not include its headers.
#pragma once

#include <cstdint>

namespace spherehead {

using Task = void (*)(void* context, std::int64_t index);

// Calls task(context, index) once for every index in [0, count), on up to torch.get_num_threads() threads. Which thread
// runs which index is not determined: a task must own what it writes.
void run_tasks(std::int64_t count, Task task, void* context);

// How many threads run tasks.
std::int64_t num_threads();

// Calls f(index) once for every index in [0, count).
template <class F>
void parallel_for(std::int64_t count, const F& f) {
    run_tasks(count, [](void* context, std::int64_t index) { (*static_cast<const F*>(context))(index); },
              const_cast<F*>(&f));
}

}  // namespace spherehead
