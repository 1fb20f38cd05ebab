// Norms, rotation with the write of keys and values, and the router.
#include <cmath>

#include "kernels/gemm.h"

namespace eightfold::EIGHTFOLD_ISA {
namespace {

template <class T>
void norm_token(const RmsNorm& a, int64_t t) {
  const float* x = a.x + t * a.x_stride;
  float* total = a.total + t * a.width;
  float* out = a.out + t * a.width;
  const T* weight = static_cast<const T*>(a.weight);
  vf squares = zero();
  for (int64_t i = 0; i < a.width; i += VL) {
    const int64_t left = smaller<int64_t>(VL, a.width - i);
    vf v = load_n(x + i, left);
    if (a.residual) {
      v = add(v, load_n(a.residual + t * a.residual_stride + i, left));
      store_n(total + i, v, left);
    }
    squares = fma(v, v, squares);
  }
  const vf scale = set1(1.f / sqrtf(sum(squares) / static_cast<float>(a.width) + a.eps));
  const float* from = a.residual ? total : x;
  for (int64_t i = 0; i < a.width; i += VL) {
    const int64_t left = smaller<int64_t>(VL, a.width - i);
    store_n(out + i, mul(mul(load_n(from + i, left), scale), load_n(weight + i, left)), left);
  }
}

void rotate(const float* x, const float* cos, const float* sin, int64_t dim, bool interleaved, float* out) {
  const int64_t half = dim / 2;
  if (interleaved) {
    for (int64_t i = 0; i < half; i++) {
      const float a = x[2 * i], b = x[2 * i + 1];
      out[2 * i] = a * cos[i] - b * sin[i];
      out[2 * i + 1] = b * cos[i] + a * sin[i];
    }
    return;
  }
  for (int64_t i = 0; i < half; i += VL) {
    const int64_t left = smaller<int64_t>(VL, half - i);
    const vf a = load_n(x + i, left), b = load_n(x + half + i, left);
    const vf c = load_n(cos + i, left), s = load_n(sin + i, left);
    store_n(out + i, sub(mul(a, c), mul(b, s)), left);
    store_n(out + half + i, add(mul(b, c), mul(a, s)), left);
  }
}

template <class T>
void write_row(const float* x, int64_t dim, void* pages, int64_t at) {
  T* to = static_cast<T*>(pages) + at;
  for (int64_t i = 0; i < dim; i += VL) {
    const int64_t left = smaller<int64_t>(VL, dim - i);
    store_n(to + i, load_n(x + i, left), left);
  }
}

void write_row(Dtype dtype, const float* x, int64_t dim, void* pages, int64_t at) {
  switch (dtype) {
    case Dtype::f32:
      return write_row<float>(x, dim, pages, at);
    case Dtype::bf16:
      return write_row<bf16>(x, dim, pages, at);
    case Dtype::f16:
      return write_row<f16>(x, dim, pages, at);
    case Dtype::i8:
      return;  // by write_int8_rows
  }
}

// Symmetric: scale = absmax / 127, rounded half to even; a row that is zero, or so small that 127 / absmax would
// overflow, gets scale 0. Returns whether all of the row is finite.
bool write_int8(const float* x, int64_t dim, void* pages, int64_t at, float* scale) {
  vf most = zero(), bad = zero();
  for (int64_t i = 0; i < dim; i += VL) {
    const vf v = load_n(x + i, smaller<int64_t>(VL, dim - i));
    most = largest(most, absolute(v));
    bad = fma(v, zero(), bad);
  }
  const float absmax = largest_of(most);
  const bool finite = sum(bad) == 0.f, empty = !finite || absmax < 1e-30f;
  const vf inverse = set1(empty ? 0.f : 127.f / absmax);
  int8_t* to = static_cast<int8_t*>(pages) + at;
  for (int64_t i = 0; i < dim; i += VL) {
    const int64_t left = smaller<int64_t>(VL, dim - i);
    float rounded[VL];
    store(rounded, round_even(mul(finite ? load_n(x + i, left) : zero(), inverse)));
    for (int64_t j = 0; j < left; j++) to[i + j] = static_cast<int8_t>(rounded[j]);
  }
  *scale = empty ? 0.f : absmax / 127.f;
  return finite;
}

// A key or value that is not finite must show in the answer, and int8 cannot hold it: both scales become NaN.
void write_int8_rows(const RopeWrite& a, const float* key, const float* value, int64_t page, int64_t head,
                     int64_t slot) {
  const int64_t scale = (page * a.kv_heads + head) * a.page_size + slot;
  const int64_t k = page * a.k_strides[0] + head * a.k_strides[1] + slot * a.k_strides[2];
  const int64_t v = page * a.v_strides[0] + head * a.v_strides[1] + slot * a.v_strides[2];
  const bool good_key = write_int8(key, a.dim, a.k, k, a.k_scale + scale);
  const bool good_value = write_int8(value, a.dim, a.v, v, a.v_scale + scale);
  if (!good_key || !good_value) a.k_scale[scale] = a.v_scale[scale] = __builtin_nanf("");
}

void rope_token(const RopeWrite& a, int64_t t, float* turned) {
  const float* x = a.qkv + t * a.qkv_stride;
  const float* cos = a.cos + a.positions[t] * (a.dim / 2);
  const float* sin = a.sin + a.positions[t] * (a.dim / 2);
  for (int64_t h = 0; h < a.heads; h++)
    rotate(x + h * a.dim, cos, sin, a.dim, a.interleaved, a.q + (t * a.heads + h) * a.dim);
  const int64_t page = a.slots[t] / a.page_size, slot = a.slots[t] % a.page_size;
  for (int64_t h = 0; h < a.kv_heads; h++) {
    const float* value = x + (a.heads + a.kv_heads + h) * a.dim;
    rotate(x + (a.heads + h) * a.dim, cos, sin, a.dim, a.interleaved, turned);
    if (a.kv_dtype == Dtype::i8) {
      write_int8_rows(a, turned, value, page, h, slot);
      continue;
    }
    write_row(a.kv_dtype, turned, a.dim, a.k, page * a.k_strides[0] + h * a.k_strides[1] + slot * a.k_strides[2]);
    write_row(a.kv_dtype, value, a.dim, a.v, page * a.v_strides[0] + h * a.v_strides[1] + slot * a.v_strides[2]);
  }
}

// Softmax over all experts and the best of them, ties to the lower id. Weights are of those chosen, summing to 1.
void choose(const Route& a, int64_t t, float* logits) {
  float most = logits[0];
  for (int e = 1; e < a.experts; e++) most = larger(most, logits[e]);
  for (int e = 0; e < a.experts; e++) logits[e] = expf(logits[e] - most);
  float total = 0.f;
  for (int c = 0; c < a.chosen; c++) {
    int best = 0;
    for (int e = 1; e < a.experts; e++)
      if (logits[e] > logits[best]) best = e;
    a.ids[t * a.chosen + c] = best;
    a.weights[t * a.chosen + c] = logits[best];
    total += logits[best];
    logits[best] = -1.f;
  }
  for (int c = 0; c < a.chosen; c++) a.weights[t * a.chosen + c] /= total;
}

template <class T>
void route_token(const Route& a, int64_t t, float* logits) {
  const float* x = a.x + t * a.x_stride;
  for (int e = 0; e < a.experts; e++) {
    const T* row = static_cast<const T*>(a.gate) + e * a.gate_stride;
    vf acc[2] = {zero(), zero()};
    for (int64_t i = 0; i < a.width; i += VL) {
      const int64_t left = smaller<int64_t>(VL, a.width - i);
      vf& to = acc[i / VL % 2];
      to = fma(load_n(x + i, left), load_n(row + i, left), to);
    }
    logits[e] = sum(add(acc[0], acc[1]));
  }
  choose(a, t, logits);
}

constexpr int64_t kTokensOfItem = 4;

}  // namespace

void rms_norm(const RmsNorm& a, Worker& worker) {
  const int64_t items = (a.tokens + kTokensOfItem - 1) / kTokensOfItem;
  int64_t item;
  while (worker.next(items, &item)) {
    for (int64_t t = item * kTokensOfItem; t < smaller(a.tokens, (item + 1) * kTokensOfItem); t++) {
      switch (a.weight_dtype) {
        case Dtype::f32:
          norm_token<float>(a, t);
          break;
        case Dtype::bf16:
          norm_token<bf16>(a, t);
          break;
        case Dtype::f16:
          norm_token<f16>(a, t);
          break;
        case Dtype::i8:
          break;
      }
    }
  }
  worker.end_phase(items);
}

void rope_write(const RopeWrite& a, Worker& worker) {
  float* turned = reinterpret_cast<float*>(worker.scratch(static_cast<size_t>(a.dim) * sizeof(float)));
  const int64_t items = (a.tokens + kTokensOfItem - 1) / kTokensOfItem;
  int64_t item;
  while (worker.next(items, &item))
    for (int64_t t = item * kTokensOfItem; t < smaller(a.tokens, (item + 1) * kTokensOfItem); t++)
      rope_token(a, t, turned);
  worker.end_phase(items);
}

void route(const Route& a, Worker& worker) {
  float* logits = reinterpret_cast<float*>(worker.scratch(static_cast<size_t>(a.experts) * sizeof(float)));
  const int64_t items = (a.tokens + kTokensOfItem - 1) / kTokensOfItem;
  int64_t item;
  while (worker.next(items, &item)) {
    for (int64_t t = item * kTokensOfItem; t < smaller(a.tokens, (item + 1) * kTokensOfItem); t++) {
      switch (a.gate_dtype) {
        case Dtype::f32:
          route_token<float>(a, t, logits);
          break;
        case Dtype::bf16:
          route_token<bf16>(a, t, logits);
          break;
        case Dtype::f16:
          route_token<f16>(a, t, logits);
          break;
        case Dtype::i8:
          break;
      }
    }
  }
  worker.end_phase(items);
}

}  // namespace eightfold::EIGHTFOLD_ISA
