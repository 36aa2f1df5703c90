// Texts that the C interface returns: they live until the thread's next one.
#pragma once

#include <string>
#include <utility>

namespace arc {

inline const char* message(std::string text) {
  static thread_local std::string last;
  last = std::move(text);
  return last.c_str();
}

}  // namespace arc
