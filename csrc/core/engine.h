// What Python holds: an engine (a kernel variant and its threads) and weights made ready for it. Plans each operation,
// checks every index that a kernel will follow, and runs it. Not tied to an instruction set.
#pragma once

#include <string>
#include <vector>

#include "core/kernels.h"

namespace eightfold {

class Engine {
 public:
  // Throws std::invalid_argument for a variant that is unknown or that this processor cannot run.
  Engine(int threads, const std::string& isa);
  const Kernels& kernels() const { return *kernels_; }
  Pool& pool() { return pool_; }
  // How activations go into a product with `w` when the compute dtype is bf16 (`rounded`) or wider.
  Input input_for(const Matrix& w, bool rounded) const;

  void rms_norm(const RmsNorm& args);
  void rope_write(const RopeWrite& args, int64_t table_rows, int64_t pages);
  void attention(Attention args, int64_t pages);
  void route(const Route& args);

 private:
  const Kernels* kernels_;
  Pool pool_;
};

class LinearWeights {
 public:
  LinearWeights(Engine& engine, std::vector<Matrix> weights, bool rounded);
  // x [tokens, cols] fp32 → out [tokens, sum of rows] fp32
  void run(const float* x, int64_t x_stride, int64_t tokens, float* out);

 private:
  Engine& engine_;
  Linear plan_{};
  int64_t rows_ = 0;
};

class ExpertSet {
 public:
  // Each expert is w1, w2, w3.
  ExpertSet(Engine& engine, const std::vector<std::vector<Matrix>>& experts, bool rounded);
  // x, out [tokens, width] fp32; ids, weights [tokens, chosen]
  void run(const float* x, int64_t x_stride, int64_t tokens, const int32_t* ids, const float* weights, int chosen,
           float* out);

 private:
  void run_block(Moe args, const int32_t* ids);
  Engine& engine_;
  std::vector<ExpertWeights> experts_;
  int64_t width_, inner_;
  bool used_[kInputs] = {}, inner_used_[kInputs] = {};
};

// Measured on a pool of its own; operations per second of a loop over registers, or bytes per second of reading.
double probe_operations(int which, int threads, double ms, const std::string& isa);
double probe_read_bandwidth(int64_t bytes, int threads, const std::string& isa);

const Kernels* find_variant(const std::string& isa);

}  // namespace eightfold
