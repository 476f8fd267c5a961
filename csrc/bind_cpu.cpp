// fastvq._cpu: converts numbers and calls the kernels without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bind_calls.h"
#include "bind_conv.h"
#include "bind_views.h"
#include "fastvq_cpu.h"

namespace py = pybind11;
using namespace fastvq;

namespace {

using StatisticsTuple = std::array<int64_t, 3>;

StatisticsOut statistics_out(const StatisticsTuple& t) {
  return {pointer<void>(t[0]), t[1] != 0, pointer<int64_t>(t[2])};
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("compiler", &compiler);
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : available_isas()) names.emplace_back(isa_name(isa));
    return names;
  });

  m.def("amx_unavailable", &amx_unavailable);

  m.def("nearest", [](const RowsTuple& x, const CodesTuple& c, int metric, bool fast, int64_t indices, int isa,
                      int n_threads, int64_t packed) {
    LookupCounts counts;
    {
      py::gil_scoped_release release;
      counts = nearest(rows(x), codes(c), static_cast<Metric>(metric), fast, pointer<int64_t>(indices),
                       static_cast<Isa>(isa), n_threads, pointer<void>(packed));
    }
    return py::make_tuple(counts.rescored, counts.scanned);
  });
  m.def("packed_bytes", [](const CodesTuple& c, int isa) { return packed_bytes(codes(c), static_cast<Isa>(isa)); });
  m.def("recorded_bytes", [](int64_t packed) { return recorded_bytes(pointer<const void>(packed)); });
  m.def("pack_codebook", [](const CodesTuple& c, int metric, int isa, int n_threads, int64_t packed) {
    py::gil_scoped_release release;
    pack_codebook(codes(c), static_cast<Metric>(metric), static_cast<Isa>(isa), n_threads, pointer<void>(packed));
  });
  m.def("quantize_forward",
        [](const RowsTuple& x, const CodesTuple& c, int metric, bool fast, int64_t mask, const RowsTuple& quantized,
           int64_t indices, int isa, int n_threads, int64_t packed, const std::optional<StatisticsTuple>& statistics) {
          const StatisticsOut out = statistics_out(statistics.value_or(StatisticsTuple{}));
          QuantizeSums sums;
          {
            py::gil_scoped_release release;
            sums = quantize_forward(rows(x), codes(c), static_cast<Metric>(metric), fast, pointer<const uint8_t>(mask),
                                    rows(quantized), pointer<int64_t>(indices), static_cast<Isa>(isa), n_threads,
                                    pointer<void>(packed), statistics ? &out : nullptr);
          }
          return py::make_tuple(sums.squares, sums.n_rows);
        });
  m.def("quantize_backward",
        [](const RowsTuple& x, const CodesTuple& c, int64_t indices, const std::optional<RowsTuple>& grad_quantized,
           double scale, bool rotation, const RowsTuple& grad_x, int isa, int n_threads) {
          py::gil_scoped_release release;
          const Rows g = rows(grad_quantized.value_or(RowsTuple{}));
          quantize_backward(rows(x), codes(c), pointer<const int64_t>(indices), grad_quantized ? &g : nullptr, scale,
                            rotation, rows(grad_x), static_cast<Isa>(isa), n_threads);
        });
  m.def("code_statistics",
        [](const RowsTuple& x, int64_t indices, int64_t n_codes, const StatisticsTuple& out, int isa, int n_threads) {
          py::gil_scoped_release release;
          return code_statistics(rows(x), pointer<const int64_t>(indices), n_codes, statistics_out(out),
                                 static_cast<Isa>(isa), n_threads);
        });
  m.def("count_indices", [](int64_t indices, int64_t n_rows, int64_t n_levels, int64_t n_codes) {
    IndexCount count;
    {
      py::gil_scoped_release release;
      count = count_indices(pointer<const int64_t>(indices), n_rows, n_levels, n_codes);
    }
    return py::make_tuple(count.first_bad, count.n_real);
  });
  m.def("ema_update", [](const EmaTuple& b, int64_t sums, bool sums_double, int64_t counts, double decay, double eps,
                         bool laplace, bool debias, int n_threads) {
    py::gil_scoped_release release;
    ema_update(ema_buffers(b), pointer<const void>(sums), sums_double, pointer<const int64_t>(counts),
               {decay, eps, laplace, debias}, n_threads);
  });
  m.def("residual_quantize", [](const RowsTuple& x, const CodesTuple& levels, int metric, bool fast, int64_t mask,
                                const RowsTuple& quantized, int64_t indices, int64_t squares, int64_t finite_levels,
                                int isa, int n_threads) {
    int64_t n_rows = 0;
    {
      py::gil_scoped_release release;
      residual_quantize(rows(x), codes(levels), {static_cast<Metric>(metric), fast, pointer<const uint8_t>(mask)},
                        rows(quantized),
                        {pointer<int64_t>(indices), pointer<double>(squares), &n_rows, pointer<int32_t>(finite_levels)},
                        static_cast<Isa>(isa), n_threads);
    }
    return n_rows;
  });
  m.def("residual_statistics", [](const RowsTuple& x, const CodesTuple& levels, int64_t indices, int64_t finite_levels,
                                  int64_t sums, bool sums_double, int64_t counts, int n_threads) {
    py::gil_scoped_release release;
    residual_statistics(rows(x), codes(levels), pointer<const int64_t>(indices), pointer<const int32_t>(finite_levels),
                        pointer<void>(sums), sums_double, pointer<int64_t>(counts), n_threads);
  });
  m.def("residual_backward",
        [](const RowsTuple& x, const CodesTuple& levels, int64_t indices,
           const std::optional<RowsTuple>& grad_quantized, int64_t scales, const RowsTuple& grad_x, int n_threads) {
          py::gil_scoped_release release;
          const Rows g = rows(grad_quantized.value_or(RowsTuple{}));
          residual_backward(rows(x), codes(levels), pointer<const int64_t>(indices), grad_quantized ? &g : nullptr,
                            pointer<const double>(scales), rows(grad_x), n_threads);
        });
  bind_calls(m);
  bind_masked_conv(m);
  bind_pixelcnn(m);
}
