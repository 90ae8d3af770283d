// What Python calls of memory.h.
#include "memory.h"

#include "export.h"

SPHEREHEAD_EXPORT(int, keep_freed_memory)() { return spherehead::keep_freed_memory(); }

SPHEREHEAD_EXPORT(int, stop_keeping_memory)() {
    spherehead::stop_keeping_memory();
    return 0;
}

SPHEREHEAD_EXPORT(int, release_kept_memory)(std::int64_t* bytes) {
    *bytes = spherehead::release_kept_memory();
    return 0;
}
