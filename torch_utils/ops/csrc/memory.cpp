// An allocator for CPU tensors that keeps large blocks when they are freed. Includes PyTorch's headers.
#include "memory.h"

#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace spherehead {
namespace {

constexpr std::size_t kHeaderBytes = 64;                   // in front of every block; as much as PyTorch aligns to
constexpr std::size_t kLargeBytes = std::size_t{1} << 20;  // smaller blocks are not kept

struct Header {
    std::size_t bytes;  // of the whole block where it is large; else 0
};

// Few sizes make much reuse. Pages of a block that nobody touched take no memory, so that rounding up costs little.
std::size_t rounded(std::size_t bytes) {
    const std::size_t step = std::bit_floor(bytes) / 8;
    return (bytes + step - 1) / step * step;
}
constexpr std::size_t kMostOversize = 2;  // a block may serve requests of half its size

class KeptBlocks {
  public:
    // Returns a kept block, the smallest that fits, or null.
    void* take(std::size_t bytes) {
        const std::lock_guard lock(mutex_);
        auto best = kept_.end();
        for (auto block = kept_.begin(); block != kept_.end(); ++block) {
            const bool fits = block->bytes >= bytes && block->bytes <= kMostOversize * bytes;
            if (fits && (best == kept_.end() || block->bytes <= best->bytes)) best = block;  // the youngest of a size
        }
        if (best == kept_.end()) return nullptr;
        void* start = best->start;
        kept_bytes_ -= best->bytes;
        count_live(best->bytes);
        kept_.erase(best);
        return start;
    }

    // Counts a block that was made, and removes kept ones until there is room for it: live and kept blocks together take
    // at most a quarter more than live ones ever took. The caller frees what is returned.
    std::vector<void*> add(std::size_t bytes) {
        const std::lock_guard lock(mutex_);
        count_live(bytes);
        std::size_t num_removed = 0;
        for (; num_removed < kept_.size() && live_bytes_ + kept_bytes_ > most_live_bytes_ / 4 * 5; ++num_removed)
            kept_bytes_ -= kept_[num_removed].bytes;
        return remove_oldest(num_removed);
    }

    void keep(void* start, std::size_t bytes) {
        const std::lock_guard lock(mutex_);
        live_bytes_ -= bytes;
        kept_bytes_ += bytes;
        kept_.push_back({start, bytes});
    }

    std::pair<std::vector<void*>, std::size_t> clear() {
        const std::lock_guard lock(mutex_);
        most_live_bytes_ = live_bytes_;
        const std::size_t bytes = std::exchange(kept_bytes_, 0);
        return {remove_oldest(kept_.size()), bytes};
    }

    void lock() { mutex_.lock(); }
    void unlock() { mutex_.unlock(); }

  private:
    struct Block {
        void* start;
        std::size_t bytes;
    };

    void count_live(std::size_t bytes) {
        live_bytes_ += bytes;
        most_live_bytes_ = std::max(most_live_bytes_, live_bytes_);
    }

    std::vector<void*> remove_oldest(std::size_t count) {
        std::vector<void*> removed;
        for (std::size_t i = 0; i < count; ++i) removed.push_back(kept_[i].start);
        kept_.erase(kept_.begin(), kept_.begin() + std::ptrdiff_t(count));
        return removed;
    }

    std::mutex mutex_;
    std::vector<Block> kept_;  // the oldest first
    std::size_t live_bytes_ = 0, kept_bytes_ = 0, most_live_bytes_ = 0;
};

c10::Allocator* base = nullptr;
KeptBlocks* blocks = nullptr;  // never destroyed: tensors may die after every static object

void* start_of(void* data) { return static_cast<std::byte*>(data) - kHeaderBytes; }

void free_or_keep(void* data) {
    if (data == nullptr) return;
    void* start = start_of(data);
    const std::size_t bytes = static_cast<Header*>(start)->bytes;
    if (bytes == 0) {
        base->raw_deallocate(start);
    } else {
        blocks->keep(start, bytes);
    }
}

// Asks for pages of 2 MiB where the system leaves that to the program: they are cleared faster, and looking up planes
// at random misses fewer entries of the page tables.
void ask_for_huge_pages([[maybe_unused]] void* start, [[maybe_unused]] std::size_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr std::uintptr_t kPage = std::uintptr_t{1} << 21;
    const auto address = reinterpret_cast<std::uintptr_t>(start);
    const std::uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void* make_block(std::size_t bytes) {
    if (bytes < kLargeBytes) {
        void* start = base->raw_allocate(bytes);
        static_cast<Header*>(start)->bytes = 0;
        return start;
    }
    bytes = rounded(bytes);
    void* start = blocks->take(bytes);
    if (start != nullptr) return start;
    for (void* old : blocks->add(bytes)) base->raw_deallocate(old);
    start = base->raw_allocate(bytes);
    ask_for_huge_pages(start, bytes);
    static_cast<Header*>(start)->bytes = bytes;
    return start;
}

class KeepingAllocator final : public c10::Allocator {
  public:
    c10::DataPtr allocate(std::size_t bytes) override {
        void* data = nullptr;
        if (bytes > 0) data = static_cast<std::byte*>(make_block(bytes + kHeaderBytes)) + kHeaderBytes;
        return {data, data, &free_or_keep, c10::Device(c10::DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &free_or_keep; }
    void copy_data(void* target, const void* source, std::size_t bytes) const override {
        default_copy_data(target, source, bytes);
    }
};

}  // namespace

bool keep_freed_memory() {
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    static c10::Allocator* const ours = new KeepingAllocator;
    if (c10::GetCPUAllocator() == ours) return true;
    if (base == nullptr) {
        base = c10::GetCPUAllocator();
        blocks = new KeptBlocks;
        pthread_atfork([] { blocks->lock(); }, [] { blocks->unlock(); }, [] { blocks->unlock(); });
    }
    if (base->raw_deleter() == nullptr) return false;
    c10::SetCPUAllocator(ours);
    return c10::GetCPUAllocator() == ours;
}

void stop_keeping_memory() {
    if (base != nullptr) c10::SetCPUAllocator(base);  // blocks in use know how they are freed
}

std::int64_t release_kept_memory() {
    if (blocks == nullptr) return 0;
    const auto [removed, bytes] = blocks->clear();
    for (void* start : removed) base->raw_deallocate(start);
    return std::int64_t(bytes);
}

}  // namespace spherehead
