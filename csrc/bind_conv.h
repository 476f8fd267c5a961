// Bindings of the masked convolution, included by bind_cpu.cpp.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_images.h"
#include "fastvq_cpu.h"

namespace fastvq {

namespace py = pybind11;

// Weights arrive as (address, dtype, shape [C_out, C_in, kh, kw], active taps, channel groups, whether a group sees itself).
using WeightTuple = std::tuple<uintptr_t, int, std::array<int64_t, 4>, std::vector<int64_t>, int64_t, bool>;

inline MaskedWeight to_weight(const WeightTuple& given) {
  const auto& [address, dtype, shape, taps, channel_groups, sees_own_group] = given;
  MaskedWeight w{reinterpret_cast<const void*>(address),
                 static_cast<DType>(dtype),
                 shape[0],
                 shape[1],
                 shape[2] * shape[3],
                 {},
                 (shape[2] / 2) * shape[3] + shape[3] / 2,
                 channel_groups,
                 sees_own_group};
  for (int64_t t : taps) w.taps.push_back({t, t / shape[3] - shape[2] / 2, t % shape[3] - shape[3] / 2});
  return w;
}

inline const float* const_floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }
inline float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

// (batch, height, width, channels, n_codes, kernel sizes)
using PixelCNNTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, std::vector<int64_t>>;

inline PixelCNNShape to_shape(const PixelCNNTuple& given) {
  return {std::get<0>(given), std::get<1>(given), std::get<2>(given),
          std::get<3>(given), std::get<4>(given), std::get<5>(given)};
}

inline void bind_pixelcnn(py::module_& m) {
  m.def("pixelcnn_sizes", [](const PixelCNNTuple& shape, int isa) {
    const PixelCNNSizes sizes = pixelcnn_sizes(to_shape(shape), static_cast<Isa>(isa));
    return std::make_pair(sizes.weights, sizes.cache);
  });
  m.def("pixelcnn_pack",
        [](const PixelCNNTuple& shape, const std::vector<uintptr_t>& weights, uintptr_t packed, int isa) {
          std::vector<const float*> pointers;
          for (uintptr_t address : weights) pointers.push_back(const_floats(address));
          const PixelCNNShape shape_ = to_shape(shape);
          py::gil_scoped_release release;
          pixelcnn_pack(shape_, pointers, floats(packed), static_cast<Isa>(isa));
        });
  m.def("pixelcnn_step", [](const PixelCNNTuple& shape, uintptr_t ids, uintptr_t weights, uintptr_t embedding,
                            uintptr_t cache, uintptr_t condition, int64_t condition_height, int64_t condition_width,
                            uintptr_t logits, int64_t row, int64_t column, int isa, int n_threads) {
    const PixelCNNShape shape_ = to_shape(shape);
    const PixelCNNCall call{reinterpret_cast<const int64_t*>(ids),
                            const_floats(weights),
                            const_floats(embedding),
                            floats(cache),
                            const_floats(condition),
                            condition_height,
                            condition_width,
                            floats(logits),
                            row,
                            column};
    py::gil_scoped_release release;
    pixelcnn_step(shape_, call, static_cast<Isa>(isa), n_threads);
  });
}

inline void bind_masked_conv(py::module_& m) {
  m.def("masked_conv_forward", [](const ImageTuple& x, const WeightTuple& weight, uintptr_t bias, const ImageTuple& out,
                                  int isa, int n_threads) {
    const Image x_ = to_image(x), out_ = to_image(out);
    const MaskedWeight w = to_weight(weight);
    py::gil_scoped_release release;
    masked_conv_forward(x_, w, const_floats(bias), out_, static_cast<Isa>(isa), n_threads);
  });
  m.def("gated_masked_conv_forward",
        [](const ImageTuple& x, const WeightTuple& weight, uintptr_t bias, const std::optional<ImageTuple>& condition,
           const std::optional<ImageTuple>& tanh_a, const std::optional<ImageTuple>& sigmoid_b, const ImageTuple& out,
           int isa, int n_threads) {
          const Image x_ = to_image(x), out_ = to_image(out);
          const MaskedWeight w = to_weight(weight);
          const Gate gate{to_image(condition), to_image(tanh_a), to_image(sigmoid_b), tanh_a.has_value()};
          py::gil_scoped_release release;
          gated_masked_conv_forward(x_, w, const_floats(bias), gate, out_, static_cast<Isa>(isa), n_threads);
        });
  m.def("masked_conv_input_grad",
        [](const ImageTuple& grad_out, const WeightTuple& weight, const ImageTuple& grad_x, int isa, int n_threads) {
          const Image grad_out_ = to_image(grad_out), grad_x_ = to_image(grad_x);
          const MaskedWeight w = to_weight(weight);
          py::gil_scoped_release release;
          masked_conv_input_grad(grad_out_, w, grad_x_, static_cast<Isa>(isa), n_threads);
        });
  m.def("masked_conv_weight_grad", [](const ImageTuple& x, const ImageTuple& grad_out, const WeightTuple& weight,
                                      uintptr_t grad_weight, uintptr_t grad_bias, int isa, int n_threads) {
    const Image x_ = to_image(x), grad_out_ = to_image(grad_out);
    const MaskedWeight w = to_weight(weight);
    py::gil_scoped_release release;
    masked_conv_weight_grad(x_, grad_out_, w, floats(grad_weight), floats(grad_bias), static_cast<Isa>(isa), n_threads);
  });
  m.def("gate_backward", [](uintptr_t grad, uintptr_t tanh_a, uintptr_t sigmoid_b, uintptr_t grad_ab, int64_t n_outer,
                            int64_t n_inner, int isa, int n_threads) {
    py::gil_scoped_release release;
    gate_backward(const_floats(grad), const_floats(tanh_a), const_floats(sigmoid_b), floats(grad_ab), n_outer, n_inner,
                  static_cast<Isa>(isa), n_threads);
  });
}

}  // namespace fastvq
