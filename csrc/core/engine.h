// What Python holds: an engine (a kernel variant and its threads) and weights made ready for it. Plans each operation,
// checks every index that a kernel will follow, and runs it. Not tied to an instruction set.
#pragma once

#include <functional>
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

constexpr int64_t kMoeTokens = 1024;  // tokens of a moe that go through together, so that its memory has a bound
constexpr int64_t kSharedRows = 256;  // tokens, or slots of a moe, that ranks exchange at once

// Memory whose content ranks make one, where they share the columns of int8 matrices. Of a block of up to kSharedRows
// rows they agree on the absmax, then add up the integer sums of `width`; `parts` of up to kMoeTokens tokens are added up
// where each rank has some of the experts and their weighted sum depends on its order, else it is null.
struct Exchange {
  float* absmax;
  int32_t* sums;
  float* parts;
  // Does so with the first `rows` rows of what is named → where the result is. May throw.
  std::function<uintptr_t(int what, int64_t rows)> agree;
  enum What { kAbsmax = 0, kSums = 1, kParts = 2 };
  template <class T>
  T* of_all(What what, int64_t rows) const {
    return reinterpret_cast<T*>(agree(what, rows));
  }
};

class LinearWeights {
 public:
  LinearWeights(Engine& engine, std::vector<Matrix> weights, bool rounded);
  // x [tokens, cols] fp32 → out [tokens, sum of rows] fp32
  void run(const float* x, int64_t x_stride, int64_t tokens, float* out);
  // The same where x and the one int8 matrix are this rank's columns: the sum over the ranks.
  void run_shared(const float* x, int64_t x_stride, int64_t tokens, float* out, const Exchange& exchange);

 private:
  void run_block(Linear args, const float* absmax);  // holding the pool's mutex
  Engine& engine_;
  Linear plan_{};
  int64_t rows_ = 0;
};

class ExpertSet {
 public:
  // Each expert is w1, w2, w3; the first has the number `first` among the `total` of the layer.
  ExpertSet(Engine& engine, const std::vector<std::vector<Matrix>>& experts, bool rounded, int64_t first,
            int64_t total);
  // x, out [tokens, width] fp32; ids, weights [tokens, chosen]. Other experts than these add nothing. With an exchange
  // these are this rank's columns of w2 and rows of w1 and w3: the sum over the ranks.
  void run(const float* x, int64_t x_stride, int64_t tokens, const int32_t* ids, const float* weights, int chosen,
           float* out, const Exchange* exchange);

 private:
  void run_block(Moe args, const int32_t* ids, const Exchange* exchange);  // holding the pool's mutex
  void run_steps(const Moe& args, const Exchange& exchange);
  Engine& engine_;
  std::vector<ExpertWeights> experts_;
  int64_t width_, inner_, first_, total_;
  bool used_[kInputs] = {}, inner_used_[kInputs] = {};
};

// Measured on a pool of its own; operations per second of a loop over registers, or bytes per second of reading.
double probe_operations(int which, int threads, double ms, const std::string& isa);
double probe_read_bandwidth(int64_t bytes, int threads, const std::string& isa);

const Kernels* find_variant(const std::string& isa);

}  // namespace eightfold
