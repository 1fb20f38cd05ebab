// AVX2 with FMA and F16C: vectors of eight.
#pragma once

#include <immintrin.h>

namespace eightfold::EIGHTFOLD_ISA {

constexpr int VL = 8;
constexpr int kTileRows = 2, kTileColumns = 4;  // 2 × 4 accumulators and 5 operands fit the 16 registers
using vf = __m256;
struct vi {  // a type of its own, or add(vi) and add(vf) could not be told apart in templates over __m256i
  __m256i v;
};

EF_INLINE vf zero() { return _mm256_setzero_ps(); }
EF_INLINE vf set1(float x) { return _mm256_set1_ps(x); }
EF_INLINE vi set1_int(int32_t x) { return {_mm256_set1_epi32(x)}; }
EF_INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
EF_INLINE vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
EF_INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
EF_INLINE vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
EF_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
EF_INLINE vf largest(vf a, vf b) { return _mm256_max_ps(a, b); }
EF_INLINE vf smallest(vf a, vf b) { return _mm256_min_ps(a, b); }
EF_INLINE vf absolute(vf a) { return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))); }
EF_INLINE vi add(vi a, vi b) { return {_mm256_add_epi32(a.v, b.v)}; }

EF_INLINE float sum(vf a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
EF_INLINE int32_t sum(vi a) {
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
EF_INLINE float largest_of(vf a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

EF_INLINE vf round_even(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
EF_INLINE vi to_int(vf a) { return {_mm256_cvtps_epi32(a)}; }
EF_INLINE vf to_float(vi a) { return _mm256_cvtepi32_ps(a.v); }
constexpr float kLeastPower = -127.f;  // times_power gives 0 there
EF_INLINE vf times_power(vf p, vf whole) {
  const __m256i n = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(n, 23)));
}

EF_INLINE vi load_ints(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
EF_INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
EF_INLINE vf load(const bf16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
EF_INLINE vf load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
EF_INLINE vf load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
template <class T>
EF_INLINE vf load_n(const T* p, int64_t n) {
  T buffer[VL] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof *p);
  return load(buffer);
}

EF_INLINE __m256i bf16_in_high_half(vf a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
}
EF_INLINE vf rounded_to_bf16(vf a) {
  return _mm256_castsi256_ps(_mm256_and_si256(bf16_in_high_half(a), _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
EF_INLINE void store(float* p, vf a) { _mm256_storeu_ps(p, a); }
EF_INLINE void store(bf16* p, vf a) {
  const __m256i h = _mm256_srli_epi32(bf16_in_high_half(a), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
EF_INLINE void store(f16* p, vf a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
template <class T>
EF_INLINE void store_n(T* p, vf a, int64_t n) {
  T buffer[VL];
  store(buffer, a);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof *p);
}

// VL rows of VL become VL columns.
EF_INLINE void transpose(vf* r) {
  vf t[8];
  EF_UNROLL
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  EF_UNROLL
  for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  EF_UNROLL
  for (int i = 0; i < 4; i++) {
    const vf low = r[i], high = r[i + 4];
    r[i] = _mm256_permute2f128_ps(low, high, 0x20);
    r[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}

// int8 products are widened to int16 first: the instruction for int8 pairs saturates its sums.
typedef int16_t quantized;
constexpr int kDot8 = 16;  // elements of one step
EF_INLINE void store_quantized(quantized* p, vi a) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.v, a.v), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
struct Weights8 {
  __m256i v;
};
EF_INLINE Weights8 load_weights8(const int8_t* p) {
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
EF_INLINE Weights8 load_weights8_n(const int8_t* p, int64_t n) {
  int8_t buffer[kDot8] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof *p);
  return load_weights8(buffer);
}
struct Quantized {
  __m256i v;
};
EF_INLINE Quantized load_quantized(const quantized* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
EF_INLINE void dot8(vi& acc, Quantized x, Weights8 w) { acc.v = _mm256_add_epi32(acc.v, _mm256_madd_epi16(x.v, w.v)); }
EF_INLINE void dot8_at(vi& acc, const quantized* x, Weights8 w) { dot8(acc, load_quantized(x), w); }

}  // namespace eightfold::EIGHTFOLD_ISA
