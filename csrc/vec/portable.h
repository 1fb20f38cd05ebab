// Vectors of four in the compilers' own extension: any processor, NEON on aarch64.
#pragma once

namespace eightfold::EIGHTFOLD_ISA {

constexpr int VL = 4;
constexpr int kTileRows = 2, kTileColumns = 4;  // tokens of a register tile; four weights wide
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));

EF_INLINE vf zero() { return vf{}; }
EF_INLINE vf set1(float x) { return vf{x, x, x, x}; }
EF_INLINE vi set1_int(int32_t x) { return vi{x, x, x, x}; }
EF_INLINE vf add(vf a, vf b) { return a + b; }
EF_INLINE vf sub(vf a, vf b) { return a - b; }
EF_INLINE vf mul(vf a, vf b) { return a * b; }
EF_INLINE vf div(vf a, vf b) { return a / b; }
EF_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
EF_INLINE vf select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
EF_INLINE vf largest(vf a, vf b) { return select(a > b, a, b); }  // b where either is a NaN, as x86 has it
EF_INLINE vf smallest(vf a, vf b) { return select(a < b, a, b); }
EF_INLINE vf absolute(vf a) { return (vf)((vi)a & set1_int(0x7fffffff)); }
EF_INLINE vi add(vi a, vi b) { return (vi)((vu)a + (vu)b); }
EF_INLINE float sum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
EF_INLINE int32_t sum(vi a) { return (int32_t)((uint32_t)a[0] + (uint32_t)a[1] + (uint32_t)a[2] + (uint32_t)a[3]); }
EF_INLINE float largest_of(vf a) {
  const float x = a[0] > a[2] ? a[0] : a[2], y = a[1] > a[3] ? a[1] : a[3];
  return x > y ? x : y;
}

// Adding and taking away 1.5 · 2^23 leaves a whole number, rounded to even, for |a| < 2^22.
EF_INLINE vf round_even(vf a) {
  const vf magic = set1(12582912.f);
  return (a + magic) - magic;
}
EF_INLINE vi to_int(vf a) {  // a is whole and small
  return vi{(int32_t)a[0], (int32_t)a[1], (int32_t)a[2], (int32_t)a[3]};
}
EF_INLINE vf to_float(vi a) { return vf{(float)a[0], (float)a[1], (float)a[2], (float)a[3]}; }
constexpr float kLeastPower = -127.f;  // times_power gives 0 there
EF_INLINE vf times_power(vf p, vf whole) {
  // Not to_int: a NaN may come this far, and converting it would be undefined.
  const vi n = (vi)(whole + set1(12582912.f)) - set1_int(0x4b400000);
  return p * (vf)((n + set1_int(127)) << 23);
}

EF_INLINE vi load_ints(const int32_t* p) {
  vi a;
  std::memcpy(&a, p, 16);
  return a;
}
EF_INLINE vf load(const float* p) {
  vf a;
  std::memcpy(&a, p, 16);
  return a;
}
EF_INLINE vf load(const bf16* p) {
  uint16_t b[4];
  std::memcpy(b, p, 8);
  const vu a = {b[0], b[1], b[2], b[3]};
  return (vf)(a << 16);
}
EF_INLINE float widen(uint16_t h) {
  // Exponent and mantissa move into place and 2^112 corrects the bias; infinities and NaNs get all exponent bits.
  uint32_t u = (uint32_t)(h & 0x7fff) << 13;
  float f;
  std::memcpy(&f, &u, 4);
  f *= 0x1p112f;
  std::memcpy(&u, &f, 4);
  if ((h & 0x7c00) == 0x7c00) u |= 0x7f800000u;
  u |= (uint32_t)(h & 0x8000) << 16;
  std::memcpy(&f, &u, 4);
  return f;
}
EF_INLINE uint16_t narrow(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint32_t sign = u >> 16 & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (u >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // from 65520 on: infinity
  if (u < 0x38800000u) {                                    // below 2^-14: the fp32 adder rounds to multiples of 2^-24
    float f;
    std::memcpy(&f, &u, 4);
    f += 0.5f;
    std::memcpy(&u, &f, 4);
    return (uint16_t)(sign | (u - 0x3f000000u));
  }
  return (uint16_t)(sign | ((u + 0xfffu + (u >> 13 & 1u) - 0x38000000u) >> 13));
}
EF_INLINE vf load(const f16* p) { return vf{widen(p[0].bits), widen(p[1].bits), widen(p[2].bits), widen(p[3].bits)}; }
EF_INLINE vf load(const int8_t* p) { return vf{(float)p[0], (float)p[1], (float)p[2], (float)p[3]}; }

template <class T>
EF_INLINE vf load_n(const T* p, int64_t n) {
  T buffer[VL] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof *p);
  return load(buffer);
}

EF_INLINE vf rounded_to_bf16(vf a) {
  const vu u = (vu)a;
  const vf r = (vf)((u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
  return select((vi)(a == a), r, a);
}
EF_INLINE void store(float* p, vf a) { std::memcpy(p, &a, 16); }
EF_INLINE void store(bf16* p, vf a) {
  for (int i = 0; i < VL; i++) {
    uint32_t u;
    const float x = a[i];
    std::memcpy(&u, &x, 4);
    p[i].bits = (u & 0x7fffffffu) > 0x7f800000u ? (uint16_t)(u >> 16 | 0x40u)
                                                : (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
  }
}
EF_INLINE void store(f16* p, vf a) {
  for (int i = 0; i < VL; i++) p[i].bits = narrow(a[i]);
}
template <class T>
EF_INLINE void store_n(T* p, vf a, int64_t n) {
  T buffer[VL];
  store(buffer, a);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof *p);
}

// VL rows of VL become VL columns.
EF_INLINE void transpose(vf* r) {
  vf c[4];
  for (int i = 0; i < 4; i++) c[i] = vf{r[0][i], r[1][i], r[2][i], r[3][i]};
  for (int i = 0; i < 4; i++) r[i] = c[i];
}

// Products of int8 are taken in int16, which holds them exactly; see gemm.h.
typedef int16_t quantized;
constexpr int kDot8 = 8;  // elements of one step
typedef int16_t v16 __attribute__((vector_size(16)));
EF_INLINE void store_quantized(quantized* p, vi a) {
  for (int i = 0; i < VL; i++) p[i] = (int16_t)a[i];
}
struct Weights8 {
  v16 v;
};
EF_INLINE Weights8 load_weights8(const int8_t* p) { return {v16{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]}}; }
EF_INLINE Weights8 load_weights8_n(const int8_t* p, int64_t n) {
  int8_t buffer[kDot8] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof *p);
  return load_weights8(buffer);
}
struct Quantized {
  v16 v;
};
EF_INLINE Quantized load_quantized(const quantized* p) {
  Quantized x;
  std::memcpy(&x.v, p, 16);
  return x;
}
EF_INLINE void dot8(vi& acc, Quantized x, Weights8 w) {
  const v16 product = x.v * w.v;  // at most 128 · 127: no overflow
  const vi even = ((vi)product << 16) >> 16, odd = (vi)product >> 16;
  acc = add(acc, even + odd);
}
EF_INLINE void dot8_at(vi& acc, const quantized* x, Weights8 w) { dot8(acc, load_quantized(x), w); }

}  // namespace eightfold::EIGHTFOLD_ISA
