// The Python module finite_width._C: facts about the build and the processor. Tensors never pass through here;
// the ops register themselves with torch's dispatcher when this library is loaded (each wing's bind.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "common/isa.h"
#include "common/kept_memory.h"
#include "common/philox.h"
#include "schemas.h"  // written by setup.py

namespace py = pybind11;
namespace fw = finite_width;

#define FW_STRINGIFY_(text) #text
#define FW_STRINGIFY(text) FW_STRINGIFY_(text)

static py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = "g++ " __VERSION__;
  facts["torch_built_for"] = FW_STRINGIFY(FINITE_WIDTH_BUILT_FOR_TORCH);
#ifdef FINITE_WIDTH_CUDA
  facts["cuda_architectures"] = FW_STRINGIFY(FINITE_WIDTH_CUDA_ARCHITECTURES);
#else
  facts["cuda_architectures"] = "";
#endif
  return facts;
}

static std::array<uint32_t, 4> philox4x32_10(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  fw::philox4x32_10(counter.data(), key[0], key[1]);
  return counter;
}

PYBIND11_MODULE(_C, module) {
  fw::isa();  // a wrong FINITE_WIDTH_ISA fails the import, not the first kernel
  module.attr("version") = FW_STRINGIFY(FINITE_WIDTH_VERSION);
  module.attr("schemas") = FINITE_WIDTH_SCHEMAS;
  module.def("build_facts", &build_facts);
  module.def("isa", [] { return fw::isa_name(fw::isa()); });
  module.def("detected_isa", [] { return fw::isa_name(fw::detected_isa()); });
  module.def("kept_bytes", &fw::kept_bytes);
  module.def("release_kept", &fw::release_kept);
  module.def("philox4x32_10", &philox4x32_10, "Philox4x32-10 of counter (c0, c1, c2, c3) and key (k0, k1)",
             py::arg("counter"), py::arg("key"));
}
