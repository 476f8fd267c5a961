// fastvq._cpu_testing: measurements inside the kernels of fastvq._cpu, for tests and benchmarks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_views.h"
#include "cpu/testing/testing.h"

namespace py = pybind11;
using namespace fastvq;

PYBIND11_MODULE(_cpu_testing, m) {
  m.def("bound_use", [](const RowsTuple& x, const CodesTuple& c, int metric, int isa) {
    BoundUse use;
    {
      py::gil_scoped_release release;
      use = bound_use(rows(x), codes(c), static_cast<Metric>(metric), static_cast<Isa>(isa));
    }
    return py::make_tuple(use.largest, use.n_pairs);
  });
  m.def("peak_gflops", [](int isa, double milliseconds) {
    py::gil_scoped_release release;
    return peak_gflops(static_cast<Isa>(isa), milliseconds);
  });
}
