// pybind11 and nothing else: numbers in, kernels called without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_conv.h"
#include "fastvq.h"

namespace py = pybind11;
using namespace fastvq;

PYBIND11_MODULE(_cpu, m) {
  m.def("compiler", &compiler);
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : available_isas()) names.emplace_back(isa_name(isa));
    return names;
  });
  bind_masked_conv(m);
}
