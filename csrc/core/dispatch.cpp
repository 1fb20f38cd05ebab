// Which kernel variants this build has, and which of them this processor can run.
#include "core/kernels.h"

#if defined(EIGHTFOLD_X86)
#include <cpuid.h>
#endif

namespace eightfold {

#define EF_VARIANT(name)        \
  namespace name {              \
  extern const Kernels kernels; \
  }
EF_VARIANT(portable)
#if defined(EIGHTFOLD_X86)
EF_VARIANT(avx2)
EF_VARIANT(avx512)
EF_VARIANT(avx512vnni)
#endif
#undef EF_VARIANT

#if defined(EIGHTFOLD_X86)
namespace {

struct Features {
  bool avx2 = false, avx512 = false, vnni_bf16 = false;
};

// By cpuid itself: the compilers' own test knows not all of these names in all versions.
Features detect() {
  Features f;
  unsigned a, b, c, d;
  const auto bit = [](unsigned word, int i) { return (word >> i & 1u) != 0; };
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return f;  // 27: the system lets programs ask what it saves
  const bool fma_f16c = bit(c, 12) && bit(c, 29);
  unsigned saved, high;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  const unsigned most = a;
  f.avx2 = fma_f16c && bit(b, 5) && (saved & 0x6u) == 0x6u;
  f.avx512 = f.avx2 && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && (saved & 0xe6u) == 0xe6u;
  const bool vnni = bit(c, 11);
  f.vnni_bf16 = f.avx512 && vnni && most >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 5);
  return f;
}

}  // namespace
#endif

const Variant* variants(int* count) {
#if defined(EIGHTFOLD_X86)
  static const Features f = detect();
  static const Variant all[] = {{&portable::kernels, true},
                                {&avx2::kernels, f.avx2},
                                {&avx512::kernels, f.avx512},
                                {&avx512vnni::kernels, f.vnni_bf16}};
#else
  static const Variant all[] = {{&portable::kernels, true}};
#endif
  *count = static_cast<int>(sizeof all / sizeof *all);
  return all;
}

int64_t prepared_stride(Input input, int64_t width, int64_t i8_bytes) {
  if (input >= Input::bf16_shuffled)
    return round_up(width, kShuffledBlock) * (input == Input::bf16_shuffled ? 2 : 4) + 64;
  const bool bytes = input == Input::i8 || input == Input::i8_rounded;
  const int64_t size = bytes ? i8_bytes : input == Input::bf16 ? 2 : 4;
  return round_up(width * size, 64) + 64;
}

}  // namespace eightfold
