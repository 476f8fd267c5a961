// fastvq._cuda: converts device addresses, sizes and streams, and launches the kernels without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "bind_images.h"
#include "bind_views.h"
#include "fastvq_cuda.h"

namespace py = pybind11;
using namespace fastvq;

namespace {

void check(int error) {
  if (error) throw std::runtime_error("fastvq: a CUDA kernel could not be launched: " + cuda::error_text(error));
}

// Weights arrive as (address, dtype, shape [C_out, C_in, kh, kw], first tap, number of taps, address of the taps that
// count or 0, channel groups, whether a group sees itself).
using ConvWeightTuple = std::tuple<int64_t, int, std::array<int64_t, 4>, int64_t, int64_t, int64_t, int64_t, bool>;

cuda::ConvWeight conv_weight(const ConvWeightTuple& given) {
  const auto& [address, dtype, shape, first_tap, n_taps, used, channel_groups, sees_own_group] = given;
  return {pointer<const void>(address),
          static_cast<DType>(dtype),
          shape[0],
          shape[1],
          shape[2],
          shape[3],
          first_tap,
          n_taps,
          pointer<const uint8_t>(used),
          channel_groups,
          sees_own_group};
}

void bind_masked_conv(py::module_& m) {
  m.def("masked_conv_workspace", [](const ConvWeightTuple& weight, bool gated, bool swapped) {
    return cuda::masked_conv_workspace(conv_weight(weight), gated, swapped);
  });
  m.def("masked_conv_forward", [](const ImageTuple& x, const ConvWeightTuple& weight, int64_t bias,
                                  const ImageTuple& out, int64_t workspace, int64_t stream) {
    py::gil_scoped_release release;
    check(cuda::masked_conv_forward(to_image(x), conv_weight(weight), pointer<const void>(bias), to_image(out),
                                    pointer<void>(workspace), pointer<void>(stream)));
  });
  m.def("gated_masked_conv_forward",
        [](const ImageTuple& x, const ConvWeightTuple& weight, int64_t bias, const std::optional<ImageTuple>& condition,
           const std::optional<ImageTuple>& tanh_a, const std::optional<ImageTuple>& sigmoid_b, const ImageTuple& out,
           int64_t workspace, int64_t stream) {
          const Gate gate{to_image(condition), to_image(tanh_a), to_image(sigmoid_b), tanh_a.has_value()};
          py::gil_scoped_release release;
          check(cuda::gated_masked_conv_forward(to_image(x), conv_weight(weight), pointer<const void>(bias), gate,
                                                to_image(out), pointer<void>(workspace), pointer<void>(stream)));
        });
  m.def("masked_conv_input_grad", [](const ImageTuple& grad_out, const ConvWeightTuple& weight,
                                     const ImageTuple& grad_x, int64_t workspace, int64_t stream) {
    py::gil_scoped_release release;
    check(cuda::masked_conv_input_grad(to_image(grad_out), conv_weight(weight), to_image(grad_x),
                                       pointer<void>(workspace), pointer<void>(stream)));
  });
  m.def("masked_conv_weight_grad_workspace", [](const ImageTuple& x, const ConvWeightTuple& weight) {
    return cuda::masked_conv_weight_grad_workspace(to_image(x), conv_weight(weight));
  });
  m.def("masked_conv_weight_grad", [](const ImageTuple& x, const ImageTuple& grad_out, const ConvWeightTuple& weight,
                                      int64_t grad_weight, int64_t grad_bias, int64_t workspace, int64_t stream) {
    py::gil_scoped_release release;
    check(cuda::masked_conv_weight_grad(to_image(x), to_image(grad_out), conv_weight(weight),
                                        pointer<void>(grad_weight), pointer<void>(grad_bias), pointer<void>(workspace),
                                        pointer<void>(stream)));
  });
  m.def("gate_backward", [](const ImageTuple& grad, const ImageTuple& tanh_a, const ImageTuple& sigmoid_b,
                            const ImageTuple& grad_ab, int64_t stream) {
    py::gil_scoped_release release;
    check(cuda::gate_backward(to_image(grad), to_image(tanh_a), to_image(sigmoid_b), to_image(grad_ab),
                              pointer<void>(stream)));
  });
}

// (ids, B, H, W), (embedding, K, C), (weights, table, layers), (cache, floats an image), (condition, h, w),
// (first position, number of positions); then the logits, or (uniforms, wanted) and how to choose.
void bind_pixelcnn(py::module_& m) {
  m.def("pixelcnn_positions", [](const std::array<int64_t, 4>& ids, const std::array<int64_t, 3>& embedding,
                                 const std::array<int64_t, 3>& layers, const std::array<int64_t, 2>& cache,
                                 const std::array<int64_t, 3>& condition, const std::array<int64_t, 2>& positions,
                                 int64_t arrived, int64_t logits, const std::array<int64_t, 2>& drawn,
                                 double temperature, int64_t top_k, double top_p, int64_t stream) {
    const cuda::SamplerCall call{pointer<int64_t>(ids[0]),
                                 ids[1],
                                 ids[2],
                                 ids[3],
                                 pointer<const float>(embedding[0]),
                                 embedding[1],
                                 embedding[2],
                                 pointer<const float>(layers[0]),
                                 pointer<const int64_t>(layers[1]),
                                 layers[2],
                                 pointer<float>(cache[0]),
                                 cache[1],
                                 pointer<const float>(condition[0]),
                                 condition[1],
                                 condition[2],
                                 positions[0],
                                 positions[1],
                                 pointer<unsigned>(arrived),
                                 pointer<float>(logits),
                                 pointer<const double>(drawn[0]),
                                 pointer<const uint8_t>(drawn[1]),
                                 {temperature, top_k, top_p},
                                 0};
    py::gil_scoped_release release;
    check(cuda::pixelcnn_positions(call, pointer<void>(stream)));
  });
}

// (metric, fast, mask, beta, deterministic), (indices, commitment loss, codebook loss, sums or 0, counts)
using OptionsTuple = std::tuple<int, bool, int64_t, double, bool>;
// (address or 0, dtype, number of real rows, factor)
using LossTuple = std::tuple<int64_t, int, int64_t, double>;

cuda::LossWeight loss_weight(const LossTuple& t) {
  return {pointer<const void>(std::get<0>(t)), static_cast<DType>(std::get<1>(t)),
          pointer<const int64_t>(std::get<2>(t)), std::get<3>(t)};
}

void bind_quantize(py::module_& m) {
  m.def("quantize_workspace", [](const RowsTuple& x, const CodesTuple& c, bool statistics) {
    return cuda::quantize_workspace(rows(x), codes(c), statistics);
  });
  m.def("quantize_forward", [](const RowsTuple& x, const CodesTuple& c, const OptionsTuple& options,
                               const RowsTuple& quantized, const std::array<int64_t, 5>& out, int64_t workspace,
                               int64_t stream) {
    const auto& [metric, fast, mask, beta, deterministic] = options;
    const cuda::QuantizeOptions o{static_cast<Metric>(metric), fast, pointer<const uint8_t>(mask), beta, deterministic};
    const cuda::QuantizeOutputs to{rows(quantized),       pointer<int64_t>(out[0]), pointer<void>(out[1]),
                                   pointer<void>(out[2]), pointer<void>(out[3]),    pointer<int64_t>(out[4])};
    py::gil_scoped_release release;
    check(cuda::quantize_forward(rows(x), codes(c), o, to, pointer<void>(workspace), pointer<void>(stream)));
  });
  m.def("quantize_rows_gradient",
        [](const RowsTuple& x, const CodesTuple& c, int64_t indices, const std::optional<RowsTuple>& g, bool rotation,
           const LossTuple& loss, const RowsTuple& grad_x, int64_t stream) {
          const cuda::RowsGradient gradient{rows(x),          g ? rows(*g) : Rows{},           rows(grad_x),
                                            codes(c),         pointer<const int64_t>(indices), rotation,
                                            loss_weight(loss)};
          py::gil_scoped_release release;
          check(cuda::quantize_rows_gradient(gradient, pointer<void>(stream)));
        });
  m.def("quantize_codes_gradient", [](const CodesTuple& c, int64_t sums, int64_t counts, const LossTuple& loss,
                                      const CodesTuple& grad_codes, int64_t stream) {
    const cuda::CodesGradient gradient{codes(c), codes(grad_codes), pointer<const double>(sums),
                                       pointer<const int64_t>(counts), loss_weight(loss)};
    py::gil_scoped_release release;
    check(cuda::quantize_codes_gradient(gradient, pointer<void>(stream)));
  });
}

void bind_residual(py::module_& m) {
  m.def("residual_fits",
        [](const RowsTuple& x, const CodesTuple& c) { return cuda::residual_fits(rows(x), codes(c)); });
  m.def("residual_workspace", [](const CodesTuple& c) { return cuda::residual_workspace(codes(c)); });
  m.def("residual_parts",
        [](const RowsTuple& x, const CodesTuple& c) { return cuda::residual_parts(rows(x), codes(c)); });
  m.def("residual_quantize",
        [](const RowsTuple& x, const CodesTuple& c, int metric, bool fast, int64_t mask, const RowsTuple& quantized,
           int64_t indices, int64_t squares, int64_t workspace, int64_t stream) {
          py::gil_scoped_release release;
          check(cuda::residual_quantize(rows(x), codes(c), static_cast<Metric>(metric), fast,
                                        pointer<const uint8_t>(mask), rows(quantized), pointer<int64_t>(indices),
                                        pointer<double>(squares), pointer<void>(workspace), pointer<void>(stream)));
        });
  m.def("residual_backward", [](const RowsTuple& x, const CodesTuple& c, int64_t indices, int64_t weights,
                                const std::optional<RowsTuple>& g, const RowsTuple& grad_x, int64_t total,
                                int64_t stream) {
    const Rows incoming = g ? rows(*g) : Rows{};
    py::gil_scoped_release release;
    check(cuda::residual_backward(rows(x), codes(c), pointer<const int64_t>(indices), pointer<const void>(weights),
                                  g ? &incoming : nullptr, rows(grad_x), pointer<void>(total), pointer<void>(stream)));
  });
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("compiler", &cuda::compiler);
  m.def("architectures", &cuda::architectures);
  m.def("unavailable", []() -> py::object {
    const int error = cuda::device_error();
    return error ? py::cast(cuda::error_text(error)) : py::object(py::none());
  });
  m.def("nearest_workspace",
        [](const RowsTuple& x, const CodesTuple& c) { return cuda::nearest_workspace(rows(x), codes(c)); });
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
                                sums_double, pointer<int64_t>(counts), pointer<void>(workspace),
                                pointer<void>(stream)));
  });
  m.def("ema_update_workspace", [](const EmaTuple& b) { return cuda::ema_update_workspace(ema_buffers(b)); });
  m.def("ema_update", [](const EmaTuple& b, int64_t sums, bool sums_double, int64_t counts, double decay, double eps,
                         bool laplace, bool debias, int64_t workspace, int64_t stream) {
    py::gil_scoped_release release;
    check(cuda::ema_update(ema_buffers(b), pointer<const void>(sums), sums_double, pointer<const int64_t>(counts),
                           {decay, eps, laplace, debias}, pointer<void>(workspace), pointer<void>(stream)));
  });
  m.def("usable_rows", [](const RowsTuple& x, int64_t usable, int64_t stream) {
    py::gil_scoped_release release;
    check(cuda::usable_rows(rows(x), pointer<uint8_t>(usable), pointer<void>(stream)));
  });
  m.def("replace_dead_codes", [](const EmaTuple& b, const RowsTuple& x, const std::array<int64_t, 4>& from,
                                 double threshold, int64_t stream) {
    const cuda::Replacement replacement{pointer<const int64_t>(from[0]), pointer<const uint8_t>(from[1]),
                                        pointer<const int64_t>(from[2]), pointer<const double>(from[3]), threshold};
    py::gil_scoped_release release;
    check(cuda::replace_dead_codes(ema_buffers(b), rows(x), replacement, pointer<void>(stream)));
  });
  bind_quantize(m);
  bind_residual(m);
  bind_masked_conv(m);
  bind_pixelcnn(m);
}
