// Calls launchers on what a file holds, so that kernels run under a sanitizer without Python around them.
//
//   calls FILE RESULTS
//
// FILE is a sequence of calls, all numbers little-endian int64: the length of the launcher's name and the name; the
// number of buffers, and of each its size and its bytes; the number of arguments, and of each a kind and a value:
//   0, an integer   1, the bits of a double   2, the number of a buffer, whose address it becomes (-1: null)
// RESULTS receives the bytes of all buffers after each call. Buffers are allocated one by one, exactly as large.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "../../csrc/bind_views.h"
#include "../../csrc/cuda/lookup.cuh"
#include "../../csrc/fastvq_cuda.h"
#include "scores.h"

using namespace fastvq;

extern "C" void set_shared_limit(size_t n_bytes);
extern "C" void set_resident(int64_t n_blocks);

namespace {

struct Arguments {
  std::vector<int64_t> values;
  size_t at = 0;

  int64_t integer() { return values.at(at++); }
  template <class T>
  T* address() {
    return pointer<T>(integer());
  }
  double real() {
    const int64_t bits = integer();
    double v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
  template <size_t n>
  std::array<int64_t, n> numbers() {
    std::array<int64_t, n> t;
    for (int64_t& v : t) v = integer();
    return t;
  }
  Rows vectors() { return rows(numbers<10>()); }
  Codes codebook() { return codes(numbers<8>()); }
  Image image() {
    const auto t = numbers<10>();
    return {pointer<void>(t[0]), static_cast<DType>(t[1]), t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9]};
  }
  cuda::ConvWeight conv_weight() {
    const auto t = numbers<11>();
    return {
        pointer<void>(t[0]), static_cast<DType>(t[1]), t[2], t[3], t[4], t[5], t[6], t[7], pointer<uint8_t>(t[8]), t[9],
        t[10] != 0};
  }
  EmaBuffers ema() { return ema_buffers(numbers<15>()); }
  Metric metric() { return static_cast<Metric>(integer()); }
};

// Braces: the arguments are taken in order.
struct NearestCall {
  Rows x;
  Codes codes;
  Metric metric;
  int64_t fast;
  const uint8_t* mask;
  int64_t *indices, *workspace;
};
NearestCall nearest_call(Arguments& a) {
  return {a.vectors(),          a.codebook(),         a.metric(),          a.integer(),
          a.address<uint8_t>(), a.address<int64_t>(), a.address<int64_t>()};
}

struct QuantizeCall {
  Rows x;
  Codes codes;
  cuda::QuantizeOptions options;
  cuda::QuantizeOutputs out;
  void* workspace;
};
cuda::LossWeight loss_weight(Arguments& a) {
  return {a.address<void>(), static_cast<DType>(a.integer()), a.address<int64_t>(), a.real()};
}
// Both gradients, at a loss of the rows and the same of the codes.
int quantize_backward(Arguments& a) {
  const cuda::RowsGradient to_rows{a.vectors(),          a.vectors(),      a.vectors(),   a.codebook(),
                                   a.address<int64_t>(), a.integer() != 0, loss_weight(a)};
  if (const int error = cuda::quantize_rows_gradient(to_rows, nullptr)) return error;
  return cuda::quantize_codes_gradient(
      {to_rows.codes, a.codebook(), a.address<double>(), a.address<int64_t>(), to_rows.loss}, nullptr);
}
struct ScoresCall {
  Codes codes;
  cuda::Scores scores;
  void* workspace;
};
struct ResidualCall {
  Rows x;
  Codes levels;
  Metric metric;
  const uint8_t* mask;
  Rows quantized;
  int64_t* indices;
  double* squares;
  void* workspace;
};

struct StatisticsCall {
  Rows x;
  const int64_t* indices;
  int64_t n_codes, deterministic;
  void* sums;
  int64_t sums_double;
  int64_t *counts, *workspace;
};
struct EmaCall {
  EmaBuffers buffers;
  const void* sums;
  int64_t sums_double;
  const int64_t* counts;
  double decay, eps;
  int64_t laplace, debias;
  void* workspace;
};
struct ConvCall {
  Image x;
  cuda::ConvWeight weight;
  const void* bias;
  Image out;
  void* workspace;
};
struct GatedConvCall {
  Image x;
  cuda::ConvWeight weight;
  const void* bias;
  Gate gate;
  Image out;
  void* workspace;
};
struct ConvGradCall {
  Image x, grad_out;
  cuda::ConvWeight weight;
  Image grad_x;
  void *grad_weight, *grad_bias, *room_x, *room_weight;
};
struct GateGradCall {
  Image grad, tanh_a, sigmoid_b, grad_ab;
};
// A map: its ids drawn in one launch, or a launch a position, logits [H, W, B, K].
int pixelcnn_map(Arguments& a) {
  cuda::SamplerCall c{a.address<int64_t>(),
                      a.integer(),
                      a.integer(),
                      a.integer(),
                      a.address<float>(),
                      a.integer(),
                      a.integer(),
                      a.address<float>(),
                      a.address<int64_t>(),
                      a.integer(),
                      a.address<float>(),
                      a.integer(),
                      a.address<float>(),
                      a.integer(),
                      a.integer(),
                      0,
                      0,
                      nullptr,
                      a.address<float>(),
                      a.address<double>(),
                      a.address<uint8_t>(),
                      {a.real(), a.integer(), a.real()},
                      0};
  const int64_t n_positions = c.height * c.width, n_launches = c.logits ? n_positions : 1;
  for (c.n_positions = n_positions / n_launches; c.first < n_positions; c.first += c.n_positions) {
    std::vector<unsigned> arrived(static_cast<size_t>(c.batch));
    c.arrived = arrived.data();
    if (const int error = cuda::pixelcnn_positions(c, nullptr)) return error;
    if (c.logits) c.logits += c.batch * c.n_codes;
  }
  return 0;
}

const std::map<std::string, std::function<int(Arguments&)>> kLaunchers = {
    {"nearest",
     [](Arguments& a) {
       const NearestCall c = nearest_call(a);
       return cuda::nearest(c.x, c.codes, c.metric, c.fast != 0, c.mask, c.indices, c.workspace, nullptr);
     }},
    // The filter alone: -2 where the full scan would have to decide.
    {"filter",
     [](Arguments& a) {
       const NearestCall c = nearest_call(a);
       cuda::PackedCodebook packed;
       cuda::packed_layout(c.codes, reinterpret_cast<unsigned char*>(c.workspace), &packed);
       if (const int error = cuda::pack_codes(c.codes, c.metric, c.fast != 0, packed, nullptr)) return error;
       return cuda::filtered_lookup({c.x, c.codes, c.metric, c.fast != 0, c.mask, c.indices}, packed, nullptr);
     }},
    {"quantize_forward",
     [](Arguments& a) {
       const QuantizeCall c{a.vectors(),
                            a.codebook(),
                            {a.metric(), a.integer() != 0, a.address<uint8_t>(), a.real(), a.integer() != 0},
                            {a.vectors(), a.address<int64_t>(), a.address<void>(), a.address<void>(), a.address<void>(),
                             a.address<int64_t>()},
                            a.address<void>()};
       return cuda::quantize_forward(c.x, c.codes, c.options, c.out, c.workspace, nullptr);
     }},
    {"quantize_backward", quantize_backward},
    {"filter_scores",
     [](Arguments& a) {
       const ScoresCall c{
           a.codebook(),
           {a.vectors(), a.metric(), a.address<float>(), a.address<float>(), a.address<int>(), a.address<float>()},
           a.address<void>()};
       return cuda::filter_scores(c.codes, c.scores, c.workspace);
     }},
    {"shared_limit",
     [](Arguments& a) {
       set_shared_limit(static_cast<size_t>(a.integer()));
       return 0;
     }},
    {"residual_quantize",
     [](Arguments& a) {
       const ResidualCall c{a.vectors(), a.codebook(),         a.metric(),          a.address<uint8_t>(),
                            a.vectors(), a.address<int64_t>(), a.address<double>(), a.address<void>()};
       return cuda::residual_quantize(c.x, c.levels, c.metric, false, c.mask, c.quantized, c.indices, c.squares,
                                      c.workspace, nullptr);
     }},
    {"resident_blocks",
     [](Arguments& a) {
       set_resident(a.integer());
       return 0;
     }},
    {"code_statistics",
     [](Arguments& a) {
       const StatisticsCall c{a.vectors(),       a.address<int64_t>(), a.integer(),          a.integer(),
                              a.address<void>(), a.integer(),          a.address<int64_t>(), a.address<int64_t>()};
       return cuda::code_statistics(c.x, c.indices, c.n_codes, c.deterministic != 0, c.sums, c.sums_double != 0,
                                    c.counts, c.workspace, nullptr);
     }},
    {"masked_conv_forward",
     [](Arguments& a) {
       const ConvCall c{a.image(), a.conv_weight(), a.address<void>(), a.image(), a.address<void>()};
       return cuda::masked_conv_forward(c.x, c.weight, c.bias, c.out, c.workspace, nullptr);
     }},
    {"gated_masked_conv_forward",
     [](Arguments& a) {
       const GatedConvCall c{a.image(),         a.conv_weight(),
                             a.address<void>(), Gate{a.image(), a.image(), a.image(), true},
                             a.image(),         a.address<void>()};
       return cuda::gated_masked_conv_forward(c.x, c.weight, c.bias, c.gate, c.out, c.workspace, nullptr);
     }},
    {"masked_conv_backward",
     [](Arguments& a) {
       const ConvGradCall c{a.image(),         a.image(),         a.conv_weight(),   a.image(),
                            a.address<void>(), a.address<void>(), a.address<void>(), a.address<void>()};
       const int error = cuda::masked_conv_input_grad(c.grad_out, c.weight, c.grad_x, c.room_x, nullptr);
       return error ? error
                    : cuda::masked_conv_weight_grad(c.x, c.grad_out, c.weight, c.grad_weight, c.grad_bias,
                                                    c.room_weight, nullptr);
     }},
    {"gate_backward",
     [](Arguments& a) {
       const GateGradCall c{a.image(), a.image(), a.image(), a.image()};
       return cuda::gate_backward(c.grad, c.tanh_a, c.sigmoid_b, c.grad_ab, nullptr);
     }},
    {"replace_dead_codes",
     [](Arguments& a) {
       const Rows x = a.vectors();
       if (const int error = cuda::usable_rows(x, a.address<uint8_t>(), nullptr)) return error;
       const EmaBuffers buffers = a.ema();
       const cuda::Replacement from{a.address<int64_t>(), a.address<uint8_t>(), a.address<int64_t>(),
                                    a.address<double>(), a.real()};
       return cuda::replace_dead_codes(buffers, x, from, nullptr);
     }},
    {"pixelcnn_map", pixelcnn_map},
    {"ema_update",
     [](Arguments& a) {
       const EmaCall c{a.ema(),  a.address<void>(), a.integer(), a.address<int64_t>(), a.real(),
                       a.real(), a.integer(),       a.integer(), a.address<void>()};
       return cuda::ema_update(c.buffers, c.sums, c.sums_double != 0, c.counts,
                               {c.decay, c.eps, c.laplace != 0, c.debias != 0}, c.workspace, nullptr);
     }},
};

bool read_bytes(FILE* file, void* to, size_t n) { return n == 0 || std::fread(to, 1, n, file) == n; }
int64_t read_number(FILE* file) {
  int64_t v;
  if (!read_bytes(file, &v, sizeof v)) std::exit(3);
  return v;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  FILE* file = std::fopen(argv[1], "rb");
  FILE* results = std::fopen(argv[2], "wb");
  if (!file || !results) return 2;
  int64_t length;
  while (read_bytes(file, &length, sizeof length)) {
    std::string name(static_cast<size_t>(length), ' ');
    if (!read_bytes(file, &name[0], name.size())) return 3;
    std::vector<std::pair<void*, size_t>> buffers(static_cast<size_t>(read_number(file)));
    for (auto& [memory, size] : buffers) {
      size = static_cast<size_t>(read_number(file));
      memory = std::malloc(size ? size : 1);
      if (!read_bytes(file, memory, size)) return 3;
    }
    Arguments arguments;
    for (int64_t n = read_number(file); n > 0; --n) {
      const int64_t kind = read_number(file), value = read_number(file);
      arguments.values.push_back(kind != 2 || value < 0
                                     ? (kind == 2 ? 0 : value)
                                     : reinterpret_cast<int64_t>(buffers.at(static_cast<size_t>(value)).first));
    }
    if (const int error = kLaunchers.at(name)(arguments)) {
      std::fprintf(stderr, "%s: error %d\n", name.c_str(), error);
      return 4;
    }
    for (auto& [memory, size] : buffers) {
      if (size && std::fwrite(memory, 1, size, results) != size) return 3;
      std::free(memory);
    }
  }
  return std::fclose(results);
}
