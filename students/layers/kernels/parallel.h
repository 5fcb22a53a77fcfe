// Work on all threads of XLA's pool.

#pragma once

#include <atomic>
#include <condition_variable>
#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ev3 {

// Calls work(i) for all i < items. The calling thread takes part and waits only for work that has started, so it never waits
// for a thread that waits for it. A thread that comes too late finds nothing left and touches neither `work` nor its data.
template <typename Work>
void parallel(xla::ffi::ThreadPool& pool, int64_t items, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
    int64_t items;
    const Work* work;
  };
  auto state = std::make_shared<State>();
  state->items = items;
  state->work = &work;
  auto take_part = [state] {
    for (int64_t i; (i = state->next++) < state->items;) {
      (*state->work)(i);
      if (++state->done == state->items) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->all_done.notify_all();
      }
    }
  };
  const int64_t threads = std::min<int64_t>(pool.num_threads(), items);
  for (int64_t i = 1; i < threads; ++i) pool.Schedule(std::function<void()>(take_part));
  take_part();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == state->items; });
}

enum Purpose { INPUT, OUTPUT, PARTIAL, PACKED, TRANSFORMED, TRANSPOSED, ZEROS };

// Memory of this thread for `floats` values. It stays allocated for the next call, because new pages cost as much as the work.
template <Purpose>
float* scratch(int64_t floats) {
  static thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats) memory.resize(floats);
  return memory.data();
}

}  // namespace ev3
