// The variant's table, and loops over registers and memory that measure what the machine can do.
#include "core/kernels.h"
#include "vec/vec.h"

#define EF_TEXT_OF(name) #name
#define EF_TEXT(name) EF_TEXT_OF(name)

namespace eightfold::EIGHTFOLD_ISA {

void rms_norm(const RmsNorm&, Worker&);
void rope_write(const RopeWrite&, Worker&);
void attention(const Attention&, Worker&);
void route(const Route&, Worker&);
void linear(const Linear&, Worker&);
void moe(const Moe&, Worker&);
void moe_step(const MoeStep&, Worker&);
void row_absmax(const RowAbsmax&, Worker&);
void scale_sums(const ScaleSums&, Worker&);
int64_t round_rows(const RoundRows&);

namespace {

constexpr int kChains = VL == 16 ? 16 : 10;  // enough to hide the latency, few enough for the registers

// Keeps the compiler from seeing through a loop.
template <class V>
EF_INLINE void keep(V& v) {
#if defined(__x86_64__)
  __asm__ volatile("" : "+v"(v));
#else
  __asm__ volatile("" : "+w"(v));
#endif
}
#if EIGHTFOLD_LEVEL >= 1
EF_INLINE void keep(vi& a) { keep(a.v); }
#endif

int64_t probe_int8(int64_t iterations) {
  quantized ones[kDot8];
  int8_t weights[kDot8];
  for (int i = 0; i < kDot8; i++) ones[i] = 1, weights[i] = 1;
  const Quantized x = load_quantized(ones);
  const Weights8 w = load_weights8(weights);
  vi acc[kChains];
  EF_UNROLL
  for (int i = 0; i < kChains; i++) acc[i] = set1_int(0);
  for (int64_t n = 0; n < iterations; n++) {
    EF_UNROLL
    for (int i = 0; i < kChains; i++) {
      dot8(acc[i], x, w);
      keep(acc[i]);
    }
  }
  vi total = set1_int(0);
  EF_UNROLL
  for (int i = 0; i < kChains; i++) total = add(total, acc[i]);
  return sum(total);
}

int64_t probe_fp32(int64_t iterations) {
  vf acc[kChains], x = set1(0.5f);
  keep(x);
  EF_UNROLL
  for (int i = 0; i < kChains; i++) acc[i] = set1(1.f);
  for (int64_t n = 0; n < iterations; n++) {
    EF_UNROLL
    for (int i = 0; i < kChains; i++) {
      acc[i] = fma(acc[i], x, x);
      keep(acc[i]);
    }
  }
  vf total = zero();
  EF_UNROLL
  for (int i = 0; i < kChains; i++) total = add(total, acc[i]);
  return static_cast<int64_t>(sum(total));
}

#if EIGHTFOLD_LEVEL >= 3
int64_t probe_bf16(int64_t iterations) {
  const uint32_t one = 0x3f803f80;
  const Pairs x = set1_pair(&one);
  vf acc[kChains];
  EF_UNROLL
  for (int i = 0; i < kChains; i++) acc[i] = zero();
  for (int64_t n = 0; n < iterations; n++) {
    EF_UNROLL
    for (int i = 0; i < kChains; i++) {
      dot_pairs(acc[i], x, x);
      keep(acc[i]);
    }
  }
  vf total = zero();
  EF_UNROLL
  for (int i = 0; i < kChains; i++) total = add(total, acc[i]);
  return static_cast<int64_t>(sum(total));
}
#endif

int64_t probe_read(const char* data, int64_t bytes) {
  constexpr int64_t step = 4 * VL * 4;
  vi acc[4] = {set1_int(0), set1_int(0), set1_int(0), set1_int(0)};
  for (int64_t i = 0; i + step <= bytes; i += step) {
    EF_UNROLL
    for (int j = 0; j < 4; j++) acc[j] = add(acc[j], load_ints(reinterpret_cast<const int32_t*>(data + i) + j * VL));
  }
  return sum(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
}

void probe(const ProbeJob& job, Worker& worker) {
  int64_t result = 0;
  if (job.which == 0) result = probe_int8(job.iterations);
#if EIGHTFOLD_LEVEL >= 3
  if (job.which == 1) result = probe_bf16(job.iterations);
#endif
  if (job.which == 2) result = probe_fp32(job.iterations);
  if (job.which == 3) {
    const int64_t share = job.bytes / worker.count() / 64 * 64;
    result = probe_read(job.data + worker.id() * share, share);
  }
  job.sink[worker.id()] = result;
}

double probe_operations(int which) {
  if (which == 0) return 2.0 * kDot8 * kChains;
  if (which == 1) return EIGHTFOLD_LEVEL >= 3 ? 64.0 * kChains : 0.0;
  return 2.0 * VL * kChains;
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    EF_TEXT(EIGHTFOLD_ISA),
    EIGHTFOLD_LEVEL >= 3,
    EIGHTFOLD_LEVEL >= 1 ? 8 * VL : 0,
    sizeof(quantized),
    rms_norm,
    rope_write,
    attention,
    route,
    linear,
    moe,
    moe_step,
    row_absmax,
    scale_sums,
    probe_operations,
    probe,
    round_rows,
};

}  // namespace eightfold::EIGHTFOLD_ISA
