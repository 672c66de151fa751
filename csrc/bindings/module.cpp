// llmserve._C: the extension's entry. Each file of this folder binds one noun.
#include "bindings/bindings.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Kernels, block pool and compiled programs of llmserve.";
  llmserve::bind_block_pool(module);
  llmserve::bind_core(module);
  llmserve::bind_sampling(module);  // before the program, whose signature names it
  llmserve::bind_program(module);
}
