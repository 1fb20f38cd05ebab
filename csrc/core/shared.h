// Ranks of one machine: a shared mapping, who is alive in it, and collectives through it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

namespace eightfold {

// Another rank failed, or rank 0 ended the job: no collective will complete any more.
struct RankLost : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A seat for each rank of this machine. A thread of its own shows that this process lives and watches the others, ten
// times a second; the first failure that anyone notices is recorded for all.
class Segment {
 public:
  enum Failure : uint32_t { kNone = 0, kReported = 1, kGone = 2, kSilent = 3, kSlow = 4, kStuck = 5 };
  static constexpr int kMostRanks = 64;

  // Maps `fd`, a file of at least `region_start()` zero bytes, and takes seat `rank` of `size`. `patience` seconds
  // without a sign of life make another rank a failed one. In an `expendable` process a failure, or the end of the job,
  // ends the process some seconds later even if it hangs. `spin_micros` is how long a wait may keep its core busy.
  Segment(int fd, int rank, int size, double patience, int spin_micros, bool expendable);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;
  // Bytes before the first group's region.
  static size_t region_start();

  int seated() const;  // ranks that have taken their seats
  void fail(const std::string& reason);  // a failure anywhere, in words that name the rank; the first one counts
  void end();  // rank 0's: the job is over
  bool ended() const;
  // From here to `end_step` this process must get on: when for `seconds` nothing of it has moved (no item of a kernel,
  // no collective, no `advance`) although none of its threads waits for a disk, it has failed.
  void begin_step(double seconds);
  void end_step();
  void advance() { moves_.fetch_add(1, std::memory_order_relaxed); }
  double still() const;  // seconds for which nothing has moved, 0 outside of steps

  // Kind, seat and process of the failed rank, with its words for kReported and its seconds for kStuck; kind kNone if
  // there is none.
  std::tuple<int, int, int, std::string> failure() const;

  // Until `word`, a counter that other ranks move, has reached `value`. Throws RankLost. `rank` is whose counter it is;
  // without `endless` it has some minutes.
  void wait(std::atomic<uint32_t>& word, std::atomic<uint32_t>& sleepers, uint32_t value, int rank, bool endless);
  char* at(size_t offset) const { return base_ + offset; }
  size_t bytes() const { return bytes_; }

 private:
  struct Seat;
  struct Header;
  Header& header() const;
  Seat& seat(int rank) const;
  void watch();
  void record(int rank, Failure kind);
  void give_reason(const std::string& reason);
  void watch_step(uint32_t* last);
  bool lost() const;

  char* base_ = nullptr;
  size_t bytes_ = 0;
  const int rank_, size_, spin_micros_, pid_;
  const uint32_t patience_ticks_;
  const bool expendable_;
  std::atomic<uint32_t> ticks_{0};
  std::atomic<uint32_t> step_limit_{0};  // in ticks; 0 outside of steps
  std::atomic<uint32_t> moves_{0}, still_{0};
  std::mutex mutex_;
  std::condition_variable leave_;
  bool leaving_ = false;
  std::thread watcher_;
};

// The collectives of some ranks of a segment, through a region of their own. All members make the same calls in the
// same order, from one thread each.
class SharedGroup {
 public:
  enum Operation : int { kSumFloat = 0, kSumInt = 1, kMaxFloat = 2 };

  // `members` are seats of the segment; `me` is this process's place among them.
  SharedGroup(Segment& segment, size_t offset, std::vector<int> members, int me);
  static size_t region_bytes(int members);

  void all_reduce(char* x, int64_t count, int operation);  // in place; 4-byte elements; summed in the order of members
  // x [rows, width] bytes → out [rows, members · width]
  void all_gather(const char* x, char* out, int64_t rows, int64_t width);
  // The first member's bytes, to all. `endless` is for receivers that may wait for their next work.
  void broadcast(char* data, int64_t bytes, bool endless);

 private:
  struct Line;
  Line& line(int member) const;
  char* slot(int member, uint32_t step) const;
  uint32_t begin();
  void post(uint32_t step);
  void await(int member, uint32_t step, bool endless = false);
  void reduce_by_all(char* x, int64_t count, int operation);
  void reduce_in_shares(char* x, int64_t count, int operation);

  Segment& segment_;
  char* region_;
  const std::vector<int> members_;
  const int me_, size_;
  uint32_t step_ = 0;
};

}  // namespace eightfold
