// The vector abstraction: one header of the same small vocabulary per instruction set.
//
//   vf, vi           VL floats, VL int32
//   load(p)          VL elements from any alignment, widened to fp32 from bf16, fp16 or int8
//   load_n(p, n)     the first n < VL of them, the others 0; reads nothing beyond
//   store, store_n   the same way back, rounding to nearest even
//   fma(a, b, c)     a · b + c (fused where the hardware fuses; the same everywhere within a variant)
//   sum(a)           all lanes, in one fixed order of pairs: (i, i + VL/2), then (i, i + VL/4), …
//   exp2_of(a)       2^a; exactly 1 at 0, and 0 far below
//
// Each variant is compiled into a namespace of its own. Nothing here or in the kernels may instantiate templates of the
// standard library: the linker would keep one copy of such a function for all variants, perhaps one that the processor
// at hand cannot execute.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/types.h"

#if !defined(EIGHTFOLD_ISA)
#error "EIGHTFOLD_ISA names the namespace of the variant"
#endif

#define EF_INLINE inline __attribute__((always_inline))

#define EF_LAMBDA __attribute__((always_inline))
#if defined(__clang__)
#define EF_UNROLL _Pragma("clang loop unroll(full)")
#else
#define EF_UNROLL _Pragma("GCC unroll 16")
#endif

namespace eightfold::EIGHTFOLD_ISA {

template <class T>
EF_INLINE constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
EF_INLINE constexpr T larger(T a, T b) {
  return a > b ? a : b;
}

}  // namespace eightfold::EIGHTFOLD_ISA

#if EIGHTFOLD_LEVEL >= 2
#include "vec/avx512.h"
#elif EIGHTFOLD_LEVEL == 1
#include "vec/avx2.h"
#else
#include "vec/portable.h"
#endif

namespace eightfold::EIGHTFOLD_ISA {

// The reference rounds to bf16 by adding half of the last place kept, ties to even; a NaN stays one.
EF_INLINE uint16_t bf16_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// 2^a for a up to 0, 0 below kLeastPower: a polynomial on the fraction in [-1/2, 1/2], relative error about 1e-7.
EF_INLINE vf exp2_to_0(vf a) {
  const vf x = largest(set1(kLeastPower), a);  // the order of operands lets a NaN through
  const vf whole = round_even(x);
  const vf r = sub(x, whole);
  vf p = set1(1.5403530e-4f);
  p = fma(p, r, set1(1.3333558e-3f));
  p = fma(p, r, set1(9.6181291e-3f));
  p = fma(p, r, set1(5.5504109e-2f));
  p = fma(p, r, set1(2.4022651e-1f));
  p = fma(p, r, set1(6.9314718e-1f));
  p = fma(p, r, set1(1.f));
  return times_power(p, whole);
}

// The same for any a; 2^127 above.
EF_INLINE vf exp2_of(vf a) { return exp2_to_0(smallest(set1(127.f), a)); }

// g · sigmoid(g)
EF_INLINE vf silu(vf g) { return div(g, add(set1(1.f), exp2_of(mul(g, set1(-1.44269504f))))); }

}  // namespace eightfold::EIGHTFOLD_ISA
