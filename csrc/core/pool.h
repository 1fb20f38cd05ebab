// The one thread pool: SPMD jobs over a few workers that spin briefly and then sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace eightfold {

class Pool;

// What one thread of a job sees. Items of a job are numbered through all its phases, so that one counter serves: a
// thread that draws an item of a later phase keeps it until the others have passed the barrier too.
class Worker {
 public:
  Worker(Pool* pool, int id, int count) : pool_(pool), id_(id), count_(count) {}
  int id() const { return id_; }
  int count() const { return count_; }

  // Draws the next item below `end` into `item` (numbered from the phase's first), or says that there is none.
  bool next(int64_t end, int64_t* item);
  // The same, but the item stays this thread's next: to bring near what it will read.
  bool peek(int64_t end, int64_t* item);
  // Ends a phase that had `items` items, none of which `next` gives out any more: waits until all are finished.
  void end_phase(int64_t items);
  // This thread's scratch memory, 64-byte aligned; it stays valid until the next call.
  char* scratch(size_t bytes);

 private:
  Pool* pool_;
  int id_, count_;
  int64_t base_ = 0;    // number of the phase's first item
  int64_t drawn_ = -1;  // an item drawn and not yet used
  int64_t taken_ = 0;   // items of this phase that this thread has worked on
};

// Lets the allocator keep up to 64 MiB that were freed, and take pieces of up to 14 MiB from it. Tensors of some MB live
// for an operation or two; from the system each would come in fresh pages, which cost more to get than to fill.
void keep_freed_memory();

using JobFunction = void (*)(const void* args, Worker& worker);

// Grow-only memory, 64-byte aligned, from huge pages where it is large.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* get(size_t bytes);

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  int threads() const { return threads_; }

  // Who works on a job: the caller and whichever other threads come in time to draw an item, the caller alone, or all.
  enum class Crowd { kWhoComes, kAlone, kEveryone };

  // Runs `function` and returns when all is done. The caller holds `mutex()`: one job at a time.
  void run(JobFunction function, const void* args, Crowd crowd = Crowd::kWhoComes);
  std::mutex& mutex() { return job_mutex_; }
  // Memory of the whole job, for the holder of the mutex; `which` is a small number.
  char* shared(int which, size_t bytes) { return shared_[which].get(bytes); }

 private:
  friend class Worker;
  struct Crew;  // the threads and what they share; left behind in a forked child, whose threads do not exist
  Crew* crew_ = nullptr;
  void start();
  void stop();

  int threads_;
  uint64_t jobs_ = 0;
  std::mutex job_mutex_;
  Buffer shared_[8];
};

// How many items all pools of this process have given out: whether it moves is whether they get on.
uint32_t items_given();

// Processors that this process may run on.
int usable_cpus();

}  // namespace eightfold
