// Large tensors on the CPU take the memory of freed ones.
#pragma once

#include <cstdint>

namespace spherehead {

// Puts an allocator that keeps freed blocks in front of PyTorch's, for the rest of the process. Returns whether it is
// there; PyTorch refuses where another one was set with a higher priority.
bool keep_freed_memory();

// Puts PyTorch's allocator back; what is kept stays until it is wanted again or released.
void stop_keeping_memory();

// Gives the kept blocks back and returns their bytes.
std::int64_t release_kept_memory();

}  // namespace spherehead
