#include "kernels/gemm.h"

#include "kernels/few.h"
#include "kernels/outer.h"

namespace eightfold::EIGHTFOLD_ISA {
namespace {

template <class T>
void prepare_float(const float* x, int64_t width, char* to, int64_t bytes, bool round) {
  T* out = reinterpret_cast<T*>(to);
  int64_t i = 0;
  for (; i + VL <= width; i += VL) store(out + i, round ? rounded_to_bf16(load(x + i)) : load(x + i));
  if (i < width) {
    const vf rest = load_n(x + i, width - i);
    store(out + i, round ? rounded_to_bf16(rest) : rest);
    i += VL;
  }
  for (; (i + VL) * static_cast<int64_t>(sizeof(T)) <= bytes; i += VL) store(out + i, zero());
}

// Symmetric by row: scale = absmax / 127, rounded half to even. Rows that are zero (or so small that 1 / scale would
// not be finite) become zeros; a row with an infinity or a NaN gets the scale NaN, so that its results show it.
template <bool kRound>
EF_INLINE vf load_rounded(const float* x, int64_t at, int64_t width) {
  const vf a = at + VL <= width ? load(x + at) : load_n(x + at, width - at);
  return kRound ? rounded_to_bf16(a) : a;
}

template <bool kRound>
float absmax_int8(const float* x, int64_t width) {
  vf most = zero(), bad = zero();
  for (int64_t i = 0; i < width; i += VL) {
    const vf a = load_rounded<kRound>(x, i, width);
    most = largest(most, absolute(a));
    bad = fma(a, zero(), bad);  // NaN from the first infinity or NaN on, else 0
  }
  return sum(bad) == 0.f ? largest_of(most) : __builtin_nanf("");
}

constexpr float kSmallestAbsmax = 1e-30f;

template <bool kRound>
void prepare_int8(const float* x, int64_t width, const Prepared& to, int64_t row) {
  const auto load_x = [&](int64_t at) EF_LAMBDA { return load_rounded<kRound>(x, at, width); };
  quantized* out = reinterpret_cast<quantized*>(to.data + row * to.stride);
  const float absmax = to.absmax ? to.absmax[row] : absmax_int8<kRound>(x, width);
  const bool finite = absmax - absmax == 0.f;
  const vf inverse = set1(finite && absmax >= kSmallestAbsmax ? 127.f / absmax : 0.f);
  vi total = set1_int(0);
  int64_t k = 0;
  for (; k < width; k += VL) {
    const vi q = to_int(round_even(mul(finite ? load_x(k) : zero(), inverse)));
    total = add(total, q);
    store_quantized(out + k, q);
  }
  for (; (k + VL) * static_cast<int64_t>(sizeof(quantized)) <= to.stride; k += VL)
    store_quantized(out + k, set1_int(0));
  to.scale[row] = scale_of(absmax);
#if EIGHTFOLD_LEVEL >= 3
  to.sum[row] = 128 * sum(total);  // the weights are multiplied with 128 added
#else
  to.sum[row] = 0;
#endif
}

void scaled(const int32_t* from, int32_t minus, float by, const float* scale, int64_t count, float* to) {
  const vi offset = set1_int(static_cast<int32_t>(0u - static_cast<uint32_t>(minus)));
  for (int64_t n = 0; n < count; n += VL) {  // scratch rows are whole vectors
    const int64_t left = smaller<int64_t>(VL, count - n);
    const vf y = mul(mul(to_float(add(load_ints(from + n), offset)), set1(by)), load_n(scale + n, left));
    if (left == VL) {
      store(to + n, y);
    } else {
      store_n(to + n, y, left);
    }
  }
}

void scale_columns(const float* c, int64_t rows, int64_t count, const float* scale, float* out, int64_t out_stride) {
  for (int64_t m = 0; m < rows; m++) {
    const float* from = c + m * kMostColumns;
    float* to = out + m * out_stride;
    int64_t n = 0;
    for (; n + VL <= count; n += VL) store(to + n, mul(load(from + n), load(scale + n)));
    if (n < count) store_n(to + n, mul(load(from + n), load_n(scale + n, count - n)), count - n);
  }
}

// Sums are collected in scratch, as rows of `out` may be so far apart that they fall on the same few cache lines.
template <class D>
void multiply_floats(const Matrix& w, const Prepared& x, int64_t x_first, int64_t rows, int64_t first, int64_t count,
                     float* out, int64_t out_stride, void* scratch, Upcoming after) {
  using X = typename D::X;
  const int64_t x_stride = x.stride / static_cast<int64_t>(sizeof(X));
  if constexpr (std::is_same_v<X, float>) {
    if (rows >= kOuterFrom && w.cols <= kOuterMost) {
      static_assert(D::kBlock >= kOuterMost && D::kStep == VL, "the same sums in the same order");
      float* sums = w.scale ? static_cast<float*>(scratch) : out;
      product_by_outer(reinterpret_cast<const X*>(x.data) + x_first * x_stride, x_stride, rows,
                     static_cast<const typename D::W*>(w.data) + first * w.stride, w.stride, count, w.cols, sums,
                     w.scale ? kMostColumns : out_stride);
      if (w.scale) scale_columns(sums, rows, count, w.scale + first, out, out_stride);
      return;
    }
  }
  float* c = out_stride == kMostColumns ? out : static_cast<float*>(scratch);
  product<D>(reinterpret_cast<const X*>(x.data) + x_first * x_stride, x_stride, rows,
             static_cast<const typename D::W*>(w.data) + first * w.stride, w.stride, count, w.cols, c, kMostColumns,
             after);
  if (w.scale) return scale_columns(c, rows, count, w.scale + first, out, out_stride);
  if (c == out) return;
  for (int64_t m = 0; m < rows; m++)
    std::memcpy(out + m * out_stride, c + m * kMostColumns, static_cast<size_t>(count) * sizeof(float));
}

}  // namespace

void prepare_row(Input input, const float* x, int64_t width, const Prepared& to, int64_t row) {
  char* out = to.data + row * to.stride;
  switch (input) {
    case Input::f32:
      return prepare_float<float>(x, width, out, to.stride, false);
    case Input::f32_rounded:
      return prepare_float<float>(x, width, out, to.stride, true);
    case Input::bf16:
      return prepare_float<bf16>(x, width, out, to.stride, false);
    case Input::i8:
      return prepare_int8<false>(x, width, to, row);
    case Input::i8_rounded:
      return prepare_int8<true>(x, width, to, row);
    case Input::bf16_shuffled:
    case Input::f32_shuffled:
    case Input::f32_rounded_shuffled:
      return prepare_shuffled(input, x, width, out);
  }
}

float absmax_of(Input input, const float* x, int64_t width) {
  return input == Input::i8_rounded ? absmax_int8<true>(x, width) : absmax_int8<false>(x, width);
}

float scale_of(float absmax) {
  if (absmax - absmax != 0.f) return __builtin_nanf("");
  return absmax < kSmallestAbsmax ? 0.f : absmax / 127.f;
}

int64_t multiply_scratch(int64_t length) {
  return kScratchSums * static_cast<int64_t>(sizeof(float)) + few_bytes(length);
}

void scale_row(const int32_t* from, float by, const float* scale, int64_t count, float* to) {
  const int64_t whole = count / VL * VL;
  scaled(from, 0, by, scale, whole, to);
  if (whole == count) return;
  int32_t rest[VL] = {};  // the memory may end with the row
  std::memcpy(rest, from + whole, static_cast<size_t>(count - whole) * sizeof *rest);
  scaled(rest, 0, by, scale + whole, count - whole, to + whole);
}

void multiply_integers(const Matrix& w, const Prepared& x, int64_t x_first, int64_t rows, int64_t first, int64_t count,
                       int32_t* out, int64_t out_stride, void* scratch, Upcoming after) {
  int32_t* c = static_cast<int32_t*>(scratch);
  const int64_t x_stride = x.stride / static_cast<int64_t>(sizeof(quantized));
  product_int8(reinterpret_cast<const quantized*>(x.data) + x_first * x_stride, x_stride, rows,
               static_cast<const int8_t*>(w.data) + first * w.stride, w.stride, count, w.cols, c, kMostColumns, after,
               c + kScratchSums);
  for (int64_t m = 0; m < rows; m++) {
    const uint32_t offset = static_cast<uint32_t>(x.sum[x_first + m]);
    for (int64_t n = 0; n < count; n++)
      out[m * out_stride + n] = static_cast<int32_t>(static_cast<uint32_t>(c[m * kMostColumns + n]) - offset);
  }
}

void multiply(const Matrix& w, [[maybe_unused]] Input input, const Prepared& x, int64_t x_first, int64_t rows,
              int64_t first, int64_t count, float* out, int64_t out_stride, void* scratch, Upcoming after) {
  if (w.groups.size)
    return multiply_int4(w, input, x, x_first, rows, first, count, out, out_stride, scratch, after);
  if (w.dtype == Dtype::i8 && !w.float_input) {
    int32_t* c = static_cast<int32_t*>(scratch);
    const int64_t x_stride = x.stride / static_cast<int64_t>(sizeof(quantized));
    product_int8(reinterpret_cast<const quantized*>(x.data) + x_first * x_stride, x_stride, rows,
                 static_cast<const int8_t*>(w.data) + first * w.stride, w.stride, count, w.cols, c, kMostColumns, after,
                 c + kScratchSums);
    for (int64_t m = 0; m < rows; m++)
      scaled(c + m * kMostColumns, x.sum[x_first + m], x.scale[x_first + m], w.scale + first, count,
             out + m * out_stride);
    return;
  }
#if EIGHTFOLD_LEVEL >= 3
  if (input == Input::bf16 && w.dtype == Dtype::i8)
    return multiply_floats<DotBf16<int8_t>>(w, x, x_first, rows, first, count, out, out_stride, scratch, after);
  if (input == Input::bf16)
    return multiply_floats<DotBf16<bf16>>(w, x, x_first, rows, first, count, out, out_stride, scratch, after);
#endif
  switch (w.dtype) {
    case Dtype::f32:
      return multiply_floats<DotFloat<float>>(w, x, x_first, rows, first, count, out, out_stride, scratch, after);
    case Dtype::bf16:
      return multiply_floats<DotFloat<bf16>>(w, x, x_first, rows, first, count, out, out_stride, scratch, after);
    case Dtype::f16:
      return multiply_floats<DotFloat<f16>>(w, x, x_first, rows, first, count, out, out_stride, scratch, after);
    case Dtype::i8:
      return multiply_floats<DotFloat<int8_t>>(w, x, x_first, rows, first, count, out, out_stride, scratch, after);
  }
}

}  // namespace eightfold::EIGHTFOLD_ISA
