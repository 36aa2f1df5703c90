// What an architecture family's translation unit offers: its tiles and the three things that can be
// done with each. The table is written out in gemm_sm100.cu and gemm_sm120.cu, largest tile first.
#pragma once

#include "arc_ao_cuda.h"

namespace arc {

struct Hardware {
  int device, sm_count;
};

struct GemmConfig {
  const char* name;
  int tile_m, tile_n, tile_k;
  const char* (*can_implement)(const ArcGemm& g);
  int64_t (*workspace)(const ArcGemm& g, Hardware hardware);
  const char* (*run)(const ArcGemm& g, Hardware hardware, void* workspace, void* stream);
};

struct GemmFamily {
  int family;  // 100 or 120
  const GemmConfig* configs;
  int size;
};

// Defined by the units that are built; gemm.cpp knows which from ARC_AO_SM100 and ARC_AO_SM120.
GemmFamily sm100_family();
GemmFamily sm120_family();

}  // namespace arc
