// Quantization, row by row: the chosen code and its squared distance, and the gradient for x.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "lookup.h"
#include "../simd/vectors.h"

namespace fastvq {
namespace {

// A row to write: a strided row is written to a buffer first, a contiguous row in place.
template <class T>
struct RowOut {
  T* at;
  T* to;
  int64_t stride, n;
  RowOut(T* p, int64_t stride_d, int64_t dim, void* buffer)
      : at(stride_d == 1 ? p : static_cast<T*>(buffer)), to(p), stride(stride_d), n(dim) {}
  void finish() const {
    if (at != to)
      for (int64_t d = 0; d < n; ++d) to[d * stride] = at[d];
  }
};

template <class EX, class EC>
double gather_rows(const LookupCall& lookup, const Rows& quantized, int64_t h, int64_t first, int64_t n,
                   int64_t& n_real, double* workspace) {
  using TX = typename EX::Stored;
  const Rows& x = *lookup.x;
  const int64_t D = x.dim;
  const int64_t* indices = lookup.indices + h * x.n_rows();
  double total = 0;
  n_real = 0;
  for (int64_t r = first; r < first + n; ++r) {
    const RowOut<TX> out(static_cast<TX*>(const_cast<void*>(quantized.data)) + quantized.offset(h, r),
                         quantized.stride_d, D, workspace);
    if (indices[r] < 0) {
      for (int64_t d = 0; d < D; ++d) out.at[d] = EX::put(0.0f);
      out.finish();
      continue;
    }
    ++n_real;
    const TX* row = contiguous(row_at<EX>(x, h, r), x.stride_d, D, workspace + D);
    const auto* code =
        contiguous(code_at<EC>(*lookup.codes, h, indices[r]), lookup.codes->stride_d, D, workspace + 2 * D);
    D8 lanes = {};
    int64_t d = 0;
    for (; d + 8 <= D; d += 8) {
      const auto c = load(EC{}, code + d);
      const D8 t = widen(load(EX{}, row + d)) - widen(c);
      lanes += t * t;
      store(EX{}, out.at + d, c);
    }
    double sum = sum_lanes(lanes);
    for (; d < D; ++d) {
      const auto c = EC::get(code[d]);
      const double t = static_cast<double>(EX::get(row[d])) - static_cast<double>(c);
      sum += t * t;
      out.at[d] = EX::put(c);
    }
    if (!(sum <= 0x1p1023) && !all_finite<EX>(row, 1, D)) sum = std::nan("");
    total += sum;
    out.finish();
  }
  return total;
}

double gather(const LookupCall& lookup, const Rows& quantized, int64_t h, int64_t first, int64_t n, int64_t& n_real,
              double* workspace) {
  return with_element(lookup.x->dtype, [&](auto ex) {
    return with_element(lookup.codes->dtype, [&](auto ec) {
      return gather_rows<decltype(ex), decltype(ec)>(lookup, quantized, h, first, n, n_real, workspace);
    });
  });
}

template <class A, class B>
struct Wider {
  using type = D8;
};
template <>
struct Wider<F8, F8> {
  using type = F8;
};
template <class Sum, class T>
inline Sum as(const T& v) {
  if constexpr (std::is_same<Sum, F8>::value)
    return v;
  else
    return widen(v);
}

// The rotation estimator's gradient: lambda (g - 2 r (r.g) + 2 x^ (q^.g)) with x^ = x/|x|, q^ = c/|c|,
// lambda = |c|/|x|, r = (x^ + q^)/|x^ + q^|: the transpose of the rotation that takes x to its code, rescaled.
// Written as lambda (g + along_x x^ + along_c q^), with x^ = x per_x and q^ = c per_c.
struct Rotation {
  bool turns = false;  // false: the gradient is g
  double lambda = 1, along_x = 0, along_c = 0, per_x = 0, per_c = 0;
};

template <class EX, class EC>
Rotation rotation_of(const typename EX::Stored* x, const typename EC::Stored* c, const typename EX::Stored* g,
                     int64_t D) {
  double xx = 0, cc = 0, xg = 0, cg = 0;
  D8 lxx = {}, lcc = {}, lxg = {}, lcg = {};
  int64_t d = 0;
  for (; d + 8 <= D; d += 8) {
    const D8 vx = widen(load(EX{}, x + d)), vc = widen(load(EC{}, c + d)), vg = widen(load(EX{}, g + d));
    lxx += vx * vx;
    lcc += vc * vc;
    lxg += vx * vg;
    lcg += vc * vg;
  }
  for (; d < D; ++d) {
    const double vx = EX::get(x[d]), vc = EC::get(c[d]), vg = EX::get(g[d]);
    xx += vx * vx;
    cc += vc * vc;
    xg += vx * vg;
    cg += vc * vg;
  }
  xx += sum_lanes(lxx);
  const double nx = std::sqrt(xx), nc = std::sqrt(cc + sum_lanes(lcc));
  xg += sum_lanes(lxg);
  cg += sum_lanes(lcg);
  const double ix = 1 / nx, ic = 1 / nc;
  if (!(xx <= std::numeric_limits<double>::max()) && !all_finite<EX>(x, 1, D)) {
    const double nan = std::nan("");  // as the formula gives for a row that is not finite
    return {true, nan, nan, nan, ix, ic};
  }
  if (!(nx > 0 && nc > 0)) return {};
  double square = 0;  // of x^ + q^; from the dot product it would cancel where the two are nearly opposite
  D8 lanes = {};
  for (d = 0; d + 8 <= D; d += 8) {
    const D8 v = widen(load(EX{}, x + d)) * ix + widen(load(EC{}, c + d)) * ic;
    lanes += v * v;
  }
  for (; d < D; ++d) {
    const double v = static_cast<double>(EX::get(x[d])) * ix + static_cast<double>(EC::get(c[d])) * ic;
    square += v * v;
  }
  square += sum_lanes(lanes);
  if (!(square > 1e-12)) return {};  // opposite: no one rotation takes x to its code
  const double rg = 2 * (xg * ix + cg * ic) / square;
  return {true, nc * ix, 2 * cg * ic - rg, -rg, ix, ic};
}

// Whether Real holds v with full precision; 0 counts.
template <class Real>
bool holds(double v) {
  const double size = std::fabs(v);
  return size == 0 || (size >= std::numeric_limits<Real>::min() && size <= std::numeric_limits<Real>::max());
}

// The gradient of one row in the arithmetic of Sum (eight elements) and Real (one): a g + b x + e c + s (x - c), or
// g + s (x - c) without a rotation. Returns whether Real held all of it; the row is written again where it did not.
template <class Sum, class Real, class EX, class EC>
bool write_gradient(const typename EX::Stored* row, const typename EC::Stored* code, const typename EX::Stored* g,
                    const Rotation& turn, double scale, typename EX::Stored* out, int64_t D) {
  const double wide_b = turn.lambda * turn.per_x * turn.along_x, wide_e = turn.lambda * turn.per_c * turn.along_c;
  if (!holds<Real>(turn.lambda) || !holds<Real>(wide_b) || !holds<Real>(wide_e) || !holds<Real>(scale)) return false;
  const Real a = static_cast<Real>(turn.lambda), b = static_cast<Real>(wide_b), e = static_cast<Real>(wide_e),
             s = static_cast<Real>(scale);
  const bool turned = turn.lambda != 1 || wide_b != 0 || wide_e != 0;
  Sum lanes{};  // sums: finite if all numbers were
  Real left = 0;
  int64_t d = 0;
  for (; d + 8 <= D; d += 8) {
    const Sum vx = as<Sum>(load(EX{}, row + d)), vc = as<Sum>(load(EC{}, code + d));
    Sum v = s == 0 ? Sum{} : s * (vx - vc);
    if (g) {
      const Sum vg = as<Sum>(load(EX{}, g + d));
      v = turned ? (a * vg + (b * vx + e * vc)) + v : vg + v;
    }
    lanes += v;
    store(EX{}, out + d, v);
  }
  for (; d < D; ++d) {
    const Real vx = EX::get(row[d]), vc = EC::get(code[d]);
    Real v = s == 0 ? Real{} : s * (vx - vc);
    if (g) {
      const Real vg = EX::get(g[d]);
      v = turned ? (a * vg + (b * vx + e * vc)) + v : vg + v;
    }
    left += v;
    out[d] = EX::put(v);
  }
  const Sum zero{}, spoilt = lanes - lanes;  // NaN for infinity and NaN
  return left - left == 0 && std::memcmp(&spoilt, &zero, sizeof zero) == 0;
}

// The same in double, with factors applied to unit vectors only: for lengths of x and c that lie far apart.
template <class EX, class EC>
void write_gradient_of_any_size(const typename EX::Stored* row, const typename EC::Stored* code,
                                const typename EX::Stored* g, const Rotation& turn, double scale,
                                typename EX::Stored* out, int64_t D) {
  for (int64_t d = 0; d < D; ++d) {
    const double vx = EX::get(row[d]), vc = EC::get(code[d]);
    double v = scale == 0 ? 0 : scale * (vx - vc);
    if (g) {
      const double vg = EX::get(g[d]);
      v += turn.turns ? turn.lambda * (vg + (turn.along_x * (vx * turn.per_x) + turn.along_c * (vc * turn.per_c))) : vg;
    }
    out[d] = EX::put(static_cast<typename EX::Real>(v));
  }
}

template <class EX, class EC>
void backward_rows(const Rows& x, const Codes& codes, const int64_t* indices, const Rows* grad_quantized, double scale,
                   bool rotation, const Rows& grad_x, int64_t h, int64_t first, int64_t n, double* workspace) {
  using TX = typename EX::Stored;
  using TC = typename EC::Stored;
  using Sum = typename Wider<decltype(load(EX{}, static_cast<const TX*>(nullptr))),
                             decltype(load(EC{}, static_cast<const TC*>(nullptr)))>::type;
  using Real = decltype(typename EX::Real{} + typename EC::Real{});
  const int64_t D = x.dim;
  const bool difference = scale != 0 || rotation;
  for (int64_t r = first; r < first + n; ++r) {
    const RowOut<TX> out(static_cast<TX*>(const_cast<void*>(grad_x.data)) + grad_x.offset(h, r), grad_x.stride_d, D,
                         workspace);
    const int64_t k = indices[h * x.n_rows() + r];
    const TX* g = grad_quantized && k >= 0
                      ? contiguous(row_at<EX>(*grad_quantized, h, r), grad_quantized->stride_d, D, workspace + D)
                      : nullptr;
    if (!difference || k < 0) {
      for (int64_t d = 0; d < D; ++d) out.at[d] = g ? g[d] : EX::put(0.0f);
      out.finish();
      continue;
    }
    const TX* row = contiguous(row_at<EX>(x, h, r), x.stride_d, D, workspace + 2 * D);
    const TC* code = contiguous(code_at<EC>(codes, h, k), codes.stride_d, D, workspace + 3 * D);
    Rotation turn;
    if (rotation && g) turn = rotation_of<EX, EC>(row, code, g, D);
    if (!write_gradient<Sum, Real, EX, EC>(row, code, g, turn, scale, out.at, D))
      write_gradient_of_any_size<EX, EC>(row, code, g, turn, scale, out.at, D);
    out.finish();
  }
}

void backward(const Rows& x, const Codes& codes, const int64_t* indices, const Rows* grad_quantized, double scale,
              bool rotation, const Rows& grad_x, int64_t h, int64_t first, int64_t n, double* workspace) {
  with_element(x.dtype, [&](auto ex) {
    with_element(codes.dtype, [&](auto ec) {
      backward_rows<decltype(ex), decltype(ec)>(x, codes, indices, grad_quantized, scale, rotation, grad_x, h, first, n,
                                                workspace);
    });
  });
}

}  // namespace
}  // namespace fastvq
