// Gradients of a field on a CPU, which many points add to.
//
// Gradients of planes are not added where they arise: those of a chunk of points are kept, and then every part of the
// planes is owned by one task, which adds them in the order of points. Sums for the decoder are made per task, and added
// in the order of tasks. The result is therefore the same for every number of threads.
#pragma once

#include <vector>

#include "field_cpu.h"

namespace spherehead::SPHEREHEAD_ISA {

// What tasks leave for the gradients of planes: gradients of features, and where their points are.
template <class T, class Representation>
class Scatter {
  public:
    Scatter(const Field& field, const Decoder<T>& d, std::int64_t slots, std::int64_t capacity)
        : field_(field), d_(d), capacity_(capacity), counts_(slots),
          arena_(Arena::bytes_of<T>(slots * capacity * row_size())) {
        memory_ = arena_.template take<T>(slots * capacity * row_size());
    }

    // Gradients of features [capacity, C'] of a slot, for a task to write.
    T* features(std::int64_t slot) { return memory_ + slot * capacity_ * row_size(); }

    void keep(std::int64_t slot, const PointBatch<T, Representation>& batch) {
        counts_[slot] = batch.count;
        T* to = features(slot) + capacity_ * d_.channels_padded;
        to = std::copy(batch.coordinates, batch.coordinates + Representation::kNumCoordinates * capacity_, to);
        std::copy(batch.weights, batch.weights + Representation::kNumWeights * capacity_, to);
    }

    // Adds the first `slots` of them to the planes of a scene.
    void add_to(T* g_planes, std::int64_t scene, std::int64_t slots) {
        const FieldOfScene<T, Representation> of_scene(field_, d_, scene);
        T* const planes = g_planes + scene * field_.scene_stride;
        // Each band goes through all points, so no more of them than threads need. Their number changes no result.
        const std::int64_t wanted = (2 * num_threads() - 1) / Representation::kNumPlanes + 1;
        const std::int64_t bands = std::min(wanted, field_.height);
        parallel_for(Representation::kNumPlanes * bands, [&](std::int64_t task) {
            const std::int64_t plane = task / bands, band = task % bands;
            for (std::int64_t slot = 0; slot < slots; ++slot) {
                const T* const where = features(slot) + capacity_ * d_.channels_padded;
                of_scene.scatter(planes, int(plane), band * field_.height / bands, (band + 1) * field_.height / bands,
                                 counts_[slot], capacity_, where, where + Representation::kNumCoordinates * capacity_,
                                 features(slot));
            }
        });
    }

  private:
    std::int64_t row_size() const {
        return d_.channels_padded + Representation::kNumCoordinates + Representation::kNumWeights;
    }

    const Field& field_;
    const Decoder<T>& d_;
    std::int64_t capacity_;
    std::vector<std::int64_t> counts_;
    Arena arena_;
    T* memory_;
};

// Runs `count` units of work on a scene, in chunks whose feature gradients fit in the cache: task(unit_begin, unit_end,
// first_slot, sums, scatter) is called for runs of units; then planes and decoder receive what it left.
template <class T, class Representation, class Task>
void backward_in_chunks(const Field& field, const Decoder<T>& d, const FieldGradients& gradients, std::int64_t count,
                        std::int64_t units_per_task, std::int64_t points_per_unit, const Task& task) {
    constexpr std::int64_t kTasksPerChunk = 16;
    const std::int64_t units_per_chunk = std::min(count, kTasksPerChunk * units_per_task);
    const std::int64_t sums_size = DecoderGradients<T>::size(d);
    Scatter<T, Representation> scatter(field, d, units_per_chunk, points_per_unit);
    std::vector<T> sums(kTasksPerChunk * sums_size);
    for (std::int64_t scene = 0; scene < field.scenes; ++scene) {
        for (std::int64_t chunk = 0; chunk < count; chunk += units_per_chunk) {
            const std::int64_t units = std::min(units_per_chunk, count - chunk);
            const std::int64_t tasks = (units + units_per_task - 1) / units_per_task;
            std::fill(sums.begin(), sums.end(), T(0));
            parallel_for(tasks, [&](std::int64_t i) {
                const std::int64_t begin = i * units_per_task, end = std::min(begin + units_per_task, units);
                task(scene, chunk + begin, chunk + end, begin, DecoderGradients<T>::in(&sums[i * sums_size], d), scatter);
            });
            if (gradients.planes != nullptr) scatter.add_to(static_cast<T*>(gradients.planes), scene, units);
            if (gradients.hidden_weight == nullptr) continue;
            for (std::int64_t i = 0; i < tasks; ++i) DecoderGradients<T>::in(&sums[i * sums_size], d).add_to(gradients, d);
        }
    }
}

// The colour layer backward, from gradients of colours before their activation [count, O']: sets the gradients of hidden
// units [count, U'], and adds to the layer's own.
template <class T>
void backward_colors(const Decoder<T>& d, const T* hidden, std::int64_t count, const T* g_linear, T* g_hidden,
                     DecoderGradients<T>& sums) {
    multiply<T>(count, d.hidden_padded, d.outputs, {g_linear, d.outputs_padded, 1}, d.color_weight, d.hidden_padded,
                nullptr, false, g_hidden, d.hidden_padded);
    multiply<T>(d.outputs, d.hidden_padded, count, {g_linear, 1, d.outputs_padded}, hidden, d.hidden_padded, nullptr, true,
                sums.color_weight, d.hidden_padded);
    for (std::int64_t i = 0; i < count; ++i) add_scaled(sums.color_bias, T(1), g_linear + i * d.outputs_padded, d.outputs_padded);
}

}  // namespace spherehead::SPHEREHEAD_ISA
