// Which level runs: the best one that the machine has, that was built, and that is allowed.
#pragma once

#include "kernels.h"

namespace arc {

// Kernels of the chosen level. ARC_AO_CPU_LEVEL=portable|avx2|avx512|amx caps it at start.
const Kernels& kernels();

}  // namespace arc

#pragma GCC visibility push(default)
extern "C" {
// Cap the level from now on; returns 0, or -1 for an unknown name. For tests and comparisons.
int arc_ao_set_cpu_level(const char* name);
const char* arc_ao_cpu_level();     // what runs
// Whether these have been measured to be faster than PyTorch's own on this machine, at this level.
int arc_ao_pairs_are_fast();
const char* arc_ao_cpu_features();  // what the machine has and the build lacks, for people
}
#pragma GCC visibility pop
