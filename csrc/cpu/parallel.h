// Loops over torch's own thread pool, so that torch.set_num_threads holds and nothing oversubscribes.
#pragma once

#include <cstdint>
#include <exception>
#include <mutex>
#include <stdexcept>

#include "../torch_shim.h"

namespace arc {

inline int64_t num_threads() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return threads;
}

// body(begin, end) over [0, size) in parts of at least `grain`; the first exception is rethrown here.
template <typename Body>
void parallel_for(int64_t size, int64_t grain, const Body& body) {
  if (size == 0) return;
  if (size <= grain) return body(int64_t{0}, size);
  struct Context {
    const Body& body;
    std::mutex mutex;
    std::exception_ptr error;
  } context{body, {}, {}};
  const auto part = [](int64_t begin, int64_t end, void* opaque) {
    Context& c = *static_cast<Context*>(opaque);
    try {
      c.body(begin, end);
    } catch (...) {
      std::lock_guard<std::mutex> lock(c.mutex);
      if (!c.error) c.error = std::current_exception();
    }
  };
  if (torch_parallel_for(0, size, grain, part, &context) != 0) {
    throw std::runtime_error("arc: torch_parallel_for failed");
  }
  if (context.error) std::rethrow_exception(context.error);
}

}  // namespace arc
