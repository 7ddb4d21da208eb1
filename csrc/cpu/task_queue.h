// How CPU kernels share work between the threads of torch: a list of tasks of unequal size, and scratch for each thread.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "huge_pages.h"

namespace m3 {

// Memory on a cache line's boundary, not initialised.
template <class T>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t count)
      : data_(static_cast<T*>(::operator new(std::max<int64_t>(count, 1) * sizeof(T), std::align_val_t{64}))) {
    ask_for_huge_pages(data_.get(), count * static_cast<int64_t>(sizeof(T)));
  }
  T* data() const { return data_.get(); }

 private:
  struct Release {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Release> data_;
};

// Runs body(task, worker) for each task on the threads of torch; a free thread takes the next task. No result may depend
// on who takes what. make_worker() is called on each thread for its scratch memory.
template <class Task, class MakeWorker, class Body>
void run_tasks(const std::vector<Task>& tasks, const MakeWorker& make_worker, const Body& body) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(tasks.size()));
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto worker = make_worker();
    for (size_t at = next++; at < tasks.size(); at = next++) body(tasks[at], worker);
  });
}

}  // namespace m3
