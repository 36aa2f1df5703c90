// Runs an exported package from C++: loads the operator library, the package and token ids, and
// writes the logits as raw bytes.
//
//     run_package LIBRARY PACKAGE IDS(int64) ROWS COLS OUTPUT
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <fstream>
#include <iostream>

int main(int argc, char** argv) {
  if (argc != 7) {
    std::cerr << "expected LIBRARY PACKAGE IDS ROWS COLS OUTPUT\n";
    return 2;
  }
  if (!dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  const at::InferenceMode inference;
  at::Tensor ids = at::empty({std::atol(argv[4]), std::atol(argv[5])}, at::kLong);
  std::ifstream(argv[3], std::ios::binary)
      .read(static_cast<char*>(ids.data_ptr()), std::streamsize(ids.nbytes()));
  torch::inductor::AOTIModelPackageLoader loader(argv[2]);
  const at::Tensor logits = loader.run({ids}).at(0).contiguous();
  std::ofstream(argv[6], std::ios::binary)
      .write(static_cast<const char*>(logits.data_ptr()), std::streamsize(logits.nbytes()));
  return 0;
}
