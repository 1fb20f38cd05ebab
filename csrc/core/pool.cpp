#include "core/pool.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <cstdlib>
#include <memory>
#include <new>

#include "core/wait.h"

namespace eightfold {
namespace {

std::atomic<int> forks{0};  // how many times this process's memory went through fork(); threads do not survive that

const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });

constexpr int kSpinMicros = 200;

// The gate of a crew: the number of the job above, the workers inside below, and between them whether it is closed.
constexpr uint64_t kClosed = uint64_t{1} << 31;
constexpr uint64_t kInside = kClosed - 1;
constexpr int kNumberShift = 32;

// Of the threads of a number, in all pools: a line of its own for each, as an item may take a microsecond only.
struct alignas(64) Given {
  std::atomic<uint32_t> items{0};
};
Given given[64];

}  // namespace

struct Pool::Crew {
  explicit Crew(int count) : crowded(count > usable_cpus()), scratch(count), fork_count(forks.load()) {}

  std::vector<std::thread> threads;
  const bool crowded;  // more threads than processors: spinning would only keep others from running
  JobFunction function = nullptr;
  const void* args = nullptr;
  int active = 0;
  std::mutex sleep_mutex;
  std::condition_variable wake;
  std::mutex turn_mutex;  // for waits within a job, which end soon unless another process has the core
  std::condition_variable turn;
  alignas(64) std::atomic<int> sleepers{0};

  // Until `ready`, which someone makes true before calling `wake_sleepers`. Both sides are sequentially consistent: who
  // goes to sleep is seen by the other, or sees that there is nothing to wait for.
  template <class Ready>
  void wait_turn(Ready ready) {
    if (spin_then_yield(ready, crowded ? 0 : kSpinMicros)) return;
    std::unique_lock<std::mutex> lock(turn_mutex);
    sleepers.fetch_add(1);
    turn.wait(lock, ready);
    sleepers.fetch_sub(1);
  }

  void wake_sleepers() {
    if (sleepers.load() == 0) return;
    { std::lock_guard<std::mutex> lock(turn_mutex); }
    turn.notify_all();
  }

  std::vector<Buffer> scratch;
  const int fork_count;
  std::atomic<bool> quit{false};
  alignas(64) std::atomic<uint64_t> gate{kClosed};
  alignas(64) std::atomic<int64_t> item{0};
  alignas(64) std::atomic<int64_t> finished{0};  // items of this job
  std::atomic<int> served{0};                    // workers that have been inside and have left
};

void keep_freed_memory() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, 14 << 20);
  mallopt(M_TRIM_THRESHOLD, 64 << 20);
#endif
}

Buffer::~Buffer() { std::free(data_); }

char* Buffer::get(size_t bytes) {
  if (bytes <= size_) return data_;
  constexpr size_t huge = 2u << 20;
  const bool large = bytes >= huge;
  const size_t align = large ? huge : 64;
  const size_t size = (bytes + align - 1) / align * align;
  std::free(data_);
  size_ = 0;
  data_ = static_cast<char*>(std::aligned_alloc(align, size));
  if (!data_) throw std::bad_alloc();
  size_ = size;
#if defined(MADV_HUGEPAGE)
  if (large) madvise(data_, size, MADV_HUGEPAGE);  // only a hint: without it the kernels are a little slower
#endif
  return data_;
}

Pool::Pool(int threads) : threads_(threads < 1 ? 1 : threads) { start(); }

Pool::~Pool() { stop(); }

void Pool::start() {
  Crew* crew = crew_ = new Crew(threads_);
  for (int id = 1; id < threads_; id++) {
    crew->threads.emplace_back([this, crew, id] {
      uint64_t seen = 0;
      for (;;) {
        const auto may_enter = [&](uint64_t gate) { return !(gate & kClosed) && gate >> kNumberShift != seen; };
        const auto called = [&] { return crew->quit.load() || may_enter(crew->gate.load()); };
        if (crew->crowded || !spin(called, kSpinMicros)) {
          std::unique_lock<std::mutex> lock(crew->sleep_mutex);
          crew->wake.wait(lock, called);
        }
        if (crew->quit.load()) return;
        uint64_t gate = crew->gate.load();
        while (may_enter(gate) && !crew->gate.compare_exchange_weak(gate, gate + 1)) {
        }
        if (!may_enter(gate)) continue;  // too late: the others have done it all
        seen = gate >> kNumberShift;
        Worker worker(this, id, crew->active);
        crew->function(crew->args, worker);
        crew->served.fetch_add(1);
        crew->gate.fetch_sub(1);
        crew->wake_sleepers();
      }
    });
  }
}

void Pool::stop() {
  Crew* crew = crew_;
  crew_ = nullptr;
  if (!crew) return;
  if (crew->fork_count != forks.load())
    return;  // its threads are not in this process: nothing to join, nothing to free
  {
    std::lock_guard<std::mutex> lock(crew->sleep_mutex);
    crew->quit.store(true);
  }
  crew->wake.notify_all();
  for (auto& thread : crew->threads) thread.join();
  delete crew;
}

// A worker that another process keeps from its core must not hold up the rest. So nobody waits for workers to come, only
// for items to be finished, and at the end for those workers to leave who did come.
void Pool::run(JobFunction function, const void* args, Crowd crowd) {
  if (crew_->fork_count != forks.load()) {
    crew_ = nullptr;  // the parent's; left as it is
    start();
  }
  Crew* crew = crew_;
  crew->item.store(0, std::memory_order_relaxed);
  if (crowd == Crowd::kAlone || threads_ == 1) {
    crew->active = 1;
    Worker worker(this, 0, 1);
    function(args, worker);
    return;
  }
  crew->active = threads_;
  crew->function = function;
  crew->args = args;
  crew->finished.store(0, std::memory_order_relaxed);
  crew->served.store(0, std::memory_order_relaxed);
  {
    // Under the lock, or a worker that has just found nothing to do would sleep through this job.
    std::lock_guard<std::mutex> lock(crew->sleep_mutex);
    crew->gate.store(++jobs_ << kNumberShift);
  }
  crew->wake.notify_all();
  Worker worker(this, 0, threads_);
  function(args, worker);
  if (crowd == Crowd::kEveryone) crew->wait_turn([&] { return crew->served.load() == threads_ - 1; });
  crew->gate.fetch_or(kClosed);
  crew->wait_turn([&] { return (crew->gate.load() & kInside) == 0; });
}

bool Worker::peek(int64_t end, int64_t* item) {
  if (drawn_ < 0) drawn_ = pool_->crew_->item.fetch_add(1, std::memory_order_relaxed);
  if (drawn_ - base_ >= end) return false;
  *item = drawn_ - base_;
  return true;
}

bool Worker::next(int64_t end, int64_t* item) {
  if (!peek(end, item)) return false;
  drawn_ = -1;
  taken_++;
  std::atomic<uint32_t>& mine = given[id_ % 64].items;  // no locked addition: one lost among many does no harm
  mine.store(mine.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  return true;
}

void Worker::end_phase(int64_t items) {
  base_ += items;
  if (count_ == 1) return;
  Pool::Crew* crew = pool_->crew_;
  const auto all_finished = [&] { return crew->finished.load() >= base_; };
  if (taken_ && crew->finished.fetch_add(taken_) + taken_ >= base_) crew->wake_sleepers();
  taken_ = 0;
  if (!all_finished()) crew->wait_turn(all_finished);
}

char* Worker::scratch(size_t bytes) { return pool_->crew_->scratch[id_].get(bytes); }

uint32_t items_given() {
  uint32_t sum = 0;
  for (const Given& one : given) sum += one.items.load(std::memory_order_relaxed);
  return sum;
}

int usable_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const int count = static_cast<int>(std::thread::hardware_concurrency());
  return count < 1 ? 1 : count;
}

}  // namespace eightfold
