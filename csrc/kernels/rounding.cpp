// Float rows to int8 with one scale a row, as eightfold.quant.int8 defines it.
#include "core/kernels.h"
#include "vec/vec.h"

namespace eightfold::EIGHTFOLD_ISA {
namespace {

constexpr float kTiny = 1.17549435e-38f;  // the least normal number; a smaller scale has too few bits to divide by

// A comparison with a NaN is false, so bits are looked at: an exponent of ones is an infinity or a NaN.
EF_INLINE bool is_finite(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return (u & 0x7f800000u) != 0x7f800000u;
}

template <class T>
EF_INLINE void widen(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + VL <= count; i += VL) store(to + i, load(from + i));
  if (i < count) store_n(to + i, load_n(from + i, count - i), count - i);
}

// Largest absolute value of a row; infinity if the row holds an infinity or a NaN.
template <class T>
float absmax_of(const T* row, int64_t count) {
  float buffer[kRoundBlock];
  uint32_t most = 0;  // of absolute values the bits are in the order of the values, NaNs above all
  for (int64_t i = 0; i < count; i += kRoundBlock) {
    const int64_t n = smaller<int64_t>(kRoundBlock, count - i);
    widen(row + i, n, buffer);
    for (int64_t j = 0; j < n; j++) {
      uint32_t u;
      std::memcpy(&u, buffer + j, 4);
      u &= 0x7fffffffu;
      most = u > most ? u : most;
    }
  }
  float result;
  std::memcpy(&result, &most, 4);
  return result;
}

template <class T>
int64_t round_rows_of(const RoundRows& a) {
  float buffer[kRoundBlock];
  for (int64_t r = 0; r < a.rows; r++) {
    const T* row = static_cast<const T*>(a.data) + r * a.stride;
    int8_t* out = a.out + r * a.cols;
    const float absmax = absmax_of(row, a.cols);
    if (!is_finite(absmax)) return r;
    const float scale = absmax / 127.f;
    const float divisor = scale > kTiny ? scale : kTiny;
    a.scales[r] = absmax == 0.f ? 0.f : divisor;
    for (int64_t i = 0; i < a.cols; i += kRoundBlock) {
      const int64_t n = smaller<int64_t>(kRoundBlock, a.cols - i);
      widen(row + i, n, buffer);
      for (int64_t j = 0; j < n; j += VL)  // beyond n are older numbers, which nobody takes
        store(buffer + j, round_even(div(load(buffer + j), set1(divisor))));
      for (int64_t j = 0; j < n; j++) out[i + j] = static_cast<int8_t>(static_cast<int32_t>(buffer[j]));
    }
  }
  return -1;
}

}  // namespace

int64_t round_rows(const RoundRows& a) {
  if (a.dtype == Dtype::f32) return round_rows_of<float>(a);
  if (a.dtype == Dtype::bf16) return round_rows_of<bf16>(a);
  return round_rows_of<f16>(a);
}

}  // namespace eightfold::EIGHTFOLD_ISA
