// Which kernel variants this build has, and which of them this processor can run.
#include "core/kernels.h"

namespace eightfold {

#define EF_VARIANT(name) \
  namespace name {       \
  extern const Kernels kernels; \
  }
EF_VARIANT(portable)
#if defined(EIGHTFOLD_X86)
EF_VARIANT(avx2)
EF_VARIANT(avx512)
EF_VARIANT(avx512vnni)
#endif
#undef EF_VARIANT

const Variant* variants(int* count) {
#if defined(EIGHTFOLD_X86)
  __builtin_cpu_init();
  const bool v2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool v512 = v2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = v512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  static const Variant all[] = {
      {&portable::kernels, true}, {&avx2::kernels, v2}, {&avx512::kernels, v512}, {&avx512vnni::kernels, vnni}};
#else
  static const Variant all[] = {{&portable::kernels, true}};
#endif
  *count = static_cast<int>(sizeof all / sizeof *all);
  return all;
}

int64_t prepared_stride(Input input, int64_t width, int64_t i8_bytes) {
  const bool bytes = input == Input::i8 || input == Input::i8_rounded;
  const int64_t size = bytes ? i8_bytes : input == Input::bf16 ? 2 : 4;
  return round_up(width * size, 64) + 64;
}

}  // namespace eightfold
