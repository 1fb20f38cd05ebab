// Plain data shared by the bindings and by every instruction-set variant of the kernels.
#pragma once

#include <cstdint>

namespace eightfold {

// Packed, that is of alignment 1: a file may have its tensors at odd addresses.
struct __attribute__((packed)) bf16 {
  uint16_t bits;
};

struct __attribute__((packed)) f16 {
  uint16_t bits;
};

enum class Dtype : int32_t { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };

// The scales of int4 weights: [rows, cols / size], rows `stride` elements apart.
struct Groups {
  const void* scale = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t size = 0, stride = 0;
};

// A weight [rows = out, cols = in] where it lies: any alignment, rows `stride` elements apart.
struct Matrix {
  const void* data = nullptr;
  const float* scale = nullptr;  // i8 only: one a row
  int64_t rows = 0, cols = 0, stride = 0;
  Dtype dtype = Dtype::f32;
  bool float_input = false;  // i8 only: activations stay floats (w8a16), else they are quantized too (w8a8)
  Groups groups = {};        // where it has a size, each i8 holds two int4 weights
};

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace eightfold
