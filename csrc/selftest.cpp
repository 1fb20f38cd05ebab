// Checks every kernel variant that the processor can run against plain loops, without Python: for processors that are
// emulated. Prints what fails; exits with 1 if anything does.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "core/engine.h"

using namespace eightfold;

namespace {

std::mt19937 random_source(1);
int failures = 0;

std::vector<float> random_floats(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& v : x) v = normal(random_source);
  return x;
}

void check(const std::string& what, const std::vector<float>& got, const std::vector<double>& want, double bound) {
  double most = 1e-30, worst = 0;
  for (size_t i = 0; i < want.size(); i++) {
    most = std::max(most, std::fabs(want[i]));
    const double off = std::fabs(got[i] - want[i]);
    worst = off <= worst ? worst : off;  // a NaN counts
  }
  const bool good = worst <= bound * most;
  if (!good) failures++;
  std::printf("%s %s: %.1e\n", good ? "ok  " : "FAIL", what.c_str(), worst / most);
}

std::vector<double> product(const std::vector<float>& x, const std::vector<float>& w, int64_t tokens, int64_t rows,
                            int64_t cols) {
  std::vector<double> out(tokens * rows);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t n = 0; n < rows; n++)
      for (int64_t k = 0; k < cols; k++) out[t * rows + n] += double(x[t * cols + k]) * w[n * cols + k];
  return out;
}

void test_dense(Engine& engine, const std::string& name) {
  const int64_t rows = 131, cols = 1101;
  const std::vector<float> full = random_floats(rows * cols);
  std::vector<float> w(full);
  std::vector<bf16> narrow(full.size());
  for (size_t i = 0; i < w.size(); i++) {  // cut off to bf16, so that both hold the same numbers
    uint32_t u;
    std::memcpy(&u, &full[i], 4);
    narrow[i].bits = static_cast<uint16_t>(u >> 16);
    u &= 0xffff0000u;
    std::memcpy(&w[i], &u, 4);
  }
  for (const int64_t tokens : {1, 3, 7, 40}) {
    const std::vector<float> x = random_floats(tokens * cols);
    const std::vector<double> want = product(x, w, tokens, rows, cols);
    for (const bool half : {false, true}) {
      const Matrix m{half ? static_cast<const void*>(narrow.data()) : w.data(),
                     nullptr,
                     rows,
                     cols,
                     cols,
                     half ? Dtype::bf16 : Dtype::f32};
      std::vector<float> out(tokens * rows);
      LinearWeights(engine, {m}, false).run(x.data(), cols, tokens, out.data());
      check(name + (half ? " bf16 linear" : " fp32 linear") + " of " + std::to_string(tokens), out, want, 1e-6);
    }
  }
}

void test_int8(Engine& engine, const std::string& name) {
  const int64_t rows = 67, cols = 4500;
  std::vector<int8_t> w(rows * cols);
  for (auto& v : w) v = static_cast<int8_t>(random_source());
  const std::vector<float> scale(rows, 1.f);
  for (const int64_t tokens : {1, 3, 7, 40}) {
    std::vector<float> x(tokens * cols);  // whole numbers up to 127 are their own quantization
    for (auto& v : x) v = static_cast<float>(static_cast<int>(random_source() % 255) - 127);
    for (int64_t t = 0; t < tokens; t++) x[t * cols] = 127;
    const std::vector<double> want = product(x, std::vector<float>(w.begin(), w.end()), tokens, rows, cols);
    std::vector<float> out(tokens * rows);
    LinearWeights(engine, {{w.data(), scale.data(), rows, cols, cols, Dtype::i8, false}}, false)
        .run(x.data(), cols, tokens, out.data());
    check(name + " int8 linear of " + std::to_string(tokens), out, want, 0);
    for (const bool rounded : {false, true}) {  // whole numbers up to 127 are exact in bf16 too
      const Matrix m{w.data(), scale.data(), rows, cols, cols, Dtype::i8, true};
      LinearWeights(engine, {m}, rounded).run(x.data(), cols, tokens, out.data());
      check(name + " int8 by float linear of " + std::to_string(tokens), out, want, 1e-6);
    }
  }
}

void test_attention(Engine& engine, const std::string& name) {
  const int64_t heads = 4, kv_heads = 2, dim = 20, size = 7, length = 1100, tokens = 30,
                pages = (length + size - 1) / size;
  const std::vector<float> q = random_floats(tokens * heads * dim), k = random_floats(pages * kv_heads * size * dim),
                           v = random_floats(pages * kv_heads * size * dim);
  std::vector<int32_t> table(pages), starts{0, tokens}, lens{length};
  for (int64_t p = 0; p < pages; p++) table[p] = static_cast<int32_t>(pages - 1 - p);
  std::vector<float> out(tokens * heads * dim);
  Attention a{};
  a.q = q.data(), a.out = out.data(), a.k = k.data(), a.v = v.data(), a.kv_dtype = Dtype::f32;
  a.query_starts = starts.data(), a.kv_lens = lens.data(), a.page_table = table.data(), a.table_stride = pages;
  a.tokens = tokens, a.rows = 1, a.heads = heads, a.kv_heads = kv_heads, a.dim = dim, a.page_size = size;
  const int64_t strides[3] = {kv_heads * size * dim, size * dim, dim};
  std::memcpy(a.k_strides, strides, sizeof strides);
  std::memcpy(a.v_strides, strides, sizeof strides);
  engine.attention(a, pages);
  std::vector<double> want(out.size());
  for (int64_t i = 0; i < tokens * heads; i++) {
    const int64_t own = length - tokens + i / heads, head = i % heads / (heads / kv_heads);
    double total = 0;
    for (int64_t p = 0; p <= own; p++) {
      const int64_t at = table[p / size] * strides[0] + head * strides[1] + p % size * dim;
      double score = 0;
      for (int64_t d = 0; d < dim; d++) score += double(q[i * dim + d]) * k[at + d];
      const double weight = std::exp(score / std::sqrt(double(dim)));
      total += weight;
      for (int64_t d = 0; d < dim; d++) want[i * dim + d] += weight * v[at + d];
    }
    for (int64_t d = 0; d < dim; d++) want[i * dim + d] /= total;
  }
  check(name + " attention", out, want, 2e-6);
}

}  // namespace

int main() {
  int count;
  const Variant* all = variants(&count);
  for (int i = 0; i < count; i++) {
    if (!all[i].usable) continue;
    const std::string name = all[i].kernels->name;
    Engine engine(2, name);
    test_dense(engine, name);
    test_int8(engine, name);
    test_attention(engine, name);
  }
  std::printf("%d failed\n", failures);
  return failures != 0;
}
