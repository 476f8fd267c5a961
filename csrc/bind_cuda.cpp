// pybind11 and nothing else: device addresses, sizes and a stream in, kernels launched without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "bind_views.h"
#include "fastvq_cuda.h"

namespace py = pybind11;
using namespace fastvq;

namespace {

void check(int error) {
  if (error) throw std::runtime_error("fastvq: a CUDA kernel could not be launched: " + cuda::error_text(error));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("compiler", &cuda::compiler);
  m.def("architectures", &cuda::architectures);
  m.def("unavailable", []() -> py::object {
    const int error = cuda::device_error();
    return error ? py::cast(cuda::error_text(error)) : py::object(py::none());
  });
  m.def("nearest_workspace", [](const RowsTuple& x, const CodesTuple& c) {
    return cuda::nearest_workspace(rows(x), codes(c));
  });
  m.def("nearest", [](const RowsTuple& x, const CodesTuple& c, int metric, bool fast, int64_t mask, int64_t indices,
                      int64_t workspace, int64_t stream) {
    py::gil_scoped_release release;
    check(cuda::nearest(rows(x), codes(c), static_cast<Metric>(metric), fast, pointer<const uint8_t>(mask),
                        pointer<int64_t>(indices), pointer<void>(workspace), pointer<void>(stream)));
  });
  m.attr("most_statistics_rows") = cuda::kMostStatisticsRows;
  m.def("code_statistics_workspace", [](const RowsTuple& x, int64_t n_codes, bool deterministic) {
    return cuda::code_statistics_workspace(rows(x), n_codes, deterministic);
  });
  m.def("code_statistics", [](const RowsTuple& x, int64_t indices, int64_t n_codes, bool deterministic, int64_t sums,
                              bool sums_double, int64_t counts, int64_t workspace, int64_t stream) {
    py::gil_scoped_release release;
    check(cuda::code_statistics(rows(x), pointer<const int64_t>(indices), n_codes, deterministic, pointer<void>(sums),
                                sums_double, pointer<int64_t>(counts), pointer<void>(workspace), pointer<void>(stream)));
  });
  m.def("ema_update_workspace", [](const EmaTuple& b) { return cuda::ema_update_workspace(ema_buffers(b)); });
  m.def("ema_update", [](const EmaTuple& b, int64_t sums, bool sums_double, int64_t counts, double decay, double eps,
                         bool laplace, bool debias, int64_t workspace, int64_t stream) {
    py::gil_scoped_release release;
    check(cuda::ema_update(ema_buffers(b), pointer<const void>(sums), sums_double, pointer<const int64_t>(counts),
                           {decay, eps, laplace, debias}, pointer<void>(workspace), pointer<void>(stream)));
  });
}
