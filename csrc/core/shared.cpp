#include "core/shared.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <fstream>
#include <system_error>

#include "core/pool.h"
#include "core/types.h"
#include "core/wait.h"

namespace eightfold {
namespace {

using Word = std::atomic<uint32_t>;
static_assert(Word::is_always_lock_free && sizeof(Word) == 4, "a word must work between processes, and for futex");

constexpr int kTickMillis = 100;
constexpr uint32_t kGraceTicks = 30;     // for an expendable process to end by itself
constexpr uint32_t kGoneTicks = 3;       // for a dead process's parent to say why it died
constexpr uint32_t kSlowTicks = 18000;   // half an hour: a rank that lives and does not come
constexpr int64_t kSlotBytes = 256 << 10;
constexpr int64_t kShareBytes = 32 << 10;  // from here on more than two ranks share the additions out
constexpr int kReasonBytes = 1000;

void futex_wait(Word& word, uint32_t value, int millis) {
  timespec limit{millis / 1000, millis % 1000 * 1000000L};
  syscall(SYS_futex, &word, FUTEX_WAIT, value, &limit, nullptr, 0);  // for every outcome the caller looks again
}

void futex_wake(Word& word) { syscall(SYS_futex, &word, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0); }

bool reached(uint32_t counter, uint32_t value) { return static_cast<int32_t>(counter - value) >= 0; }

int open_pid(int pid) {
#if defined(SYS_pidfd_open)
  return static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
#else
  return -1;  // silence will tell
#endif
}

bool has_exited(int pidfd) {
  pollfd one{pidfd, POLLIN, 0};
  return pidfd >= 0 && poll(&one, 1, 0) == 1;
}

// Whether a thread of this process is in a wait that no signal ends, as for a page that comes from a slow disk.
bool waits_for_disk() {
  bool found = false;
  DIR* folder = opendir("/proc/self/task");
  while (const dirent* entry = folder && !found ? readdir(folder) : nullptr) {
    std::ifstream file(std::string("/proc/self/task/") + entry->d_name + "/stat");
    std::string line;
    std::getline(file, line);
    const size_t name_end = line.rfind(')');  // "17 (name) D …"
    found = name_end != std::string::npos && line.compare(name_end, 3, ") D") == 0;
  }
  if (folder) closedir(folder);
  return found;
}

template <class T, class Combine>
void combine(T* out, const T* x, int64_t count, Combine with) {
  for (int64_t i = 0; i < count; i++) out[i] = with(out[i], x[i]);
}

void combine(int operation, char* out, const char* x, int64_t count) {
  auto* floats = reinterpret_cast<float*>(out);
  const auto* more = reinterpret_cast<const float*>(x);
  if (operation == SharedGroup::kSumFloat)
    combine(floats, more, count, [](float a, float b) { return a + b; });
  else if (operation == SharedGroup::kMaxFloat)
    combine(floats, more, count, [](float a, float b) { return (b > a) | (b != b) ? b : a; });
  else  // unsigned, so that an overflow wraps instead of being undefined
    combine(reinterpret_cast<uint32_t*>(out), reinterpret_cast<const uint32_t*>(x), count,
            [](uint32_t a, uint32_t b) { return a + b; });
}

}  // namespace

struct Segment::Header {
  alignas(64) Word failure;  // kind << 16 | rank, or 0
  Word ended;
};

struct alignas(64) Segment::Seat {
  Word pid, beat, left, has_reason;
  char reason[kReasonBytes];
};

size_t Segment::region_start() {
  return static_cast<size_t>(round_up(sizeof(Header) + kMostRanks * sizeof(Seat), 4096));
}

Segment::Header& Segment::header() const { return *reinterpret_cast<Header*>(base_); }
Segment::Seat& Segment::seat(int rank) const { return reinterpret_cast<Seat*>(base_ + sizeof(Header))[rank]; }

Segment::Segment(int fd, int rank, int size, double patience, int spin_micros, bool expendable)
    : rank_(rank),
      size_(size),
      spin_micros_(spin_micros),
      pid_(getpid()),
      patience_ticks_(static_cast<uint32_t>(std::max(1.0, patience * 1000 / kTickMillis))),
      expendable_(expendable) {
  if (size < 1 || size > kMostRanks || rank < 0 || rank >= size) throw std::invalid_argument("no such seat");
  struct stat about;
  if (fstat(fd, &about)) throw std::system_error(errno, std::generic_category(), "shared memory");
  bytes_ = static_cast<size_t>(about.st_size);
  if (bytes_ < region_start()) throw std::invalid_argument("the shared memory is too small");
  void* base = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "shared memory");
  base_ = static_cast<char*>(base);
  seat(rank).pid.store(static_cast<uint32_t>(pid_));
  watcher_ = std::thread([this] { watch(); });
}

Segment::~Segment() {
  if (getpid() != pid_) {  // a forked child: the thread and the seat are its parent's
    watcher_.detach();
    return;
  }
  seat(rank_).left.store(1);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    leaving_ = true;
  }
  leave_.notify_all();
  watcher_.join();
  munmap(base_, bytes_);
}

int Segment::seated() const {
  int count = 0;
  for (int r = 0; r < size_; r++) count += seat(r).pid.load() != 0;
  return count;
}

void Segment::record(int rank, Failure kind) {
  uint32_t none = 0;
  header().failure.compare_exchange_strong(none, static_cast<uint32_t>(kind) << 16 | static_cast<uint32_t>(rank));
}

void Segment::give_reason(const std::string& reason) {
  Seat& mine = seat(rank_);
  uint32_t none = 0;
  if (mine.has_reason.compare_exchange_strong(none, 1)) {
    const size_t length = std::min(reason.size(), static_cast<size_t>(kReasonBytes - 1));
    std::memcpy(mine.reason, reason.data(), length);
    mine.reason[length] = 0;
  }
}

void Segment::fail(const std::string& reason) {
  give_reason(reason);
  record(rank_, kReported);
}

void Segment::begin_step(double seconds) {
  advance();
  step_limit_.store(static_cast<uint32_t>(std::max(1.0, seconds * 1000 / kTickMillis)));
}

void Segment::end_step() {
  step_limit_.store(0);
  still_.store(0);
}

double Segment::still() const { return !step_limit_.load() ? 0 : still_.load() * kTickMillis / 1000.0; }

// Of a wait for other ranks `wait` says that it moves, so what is found is where the others' waits come from.
void Segment::watch_step(uint32_t* last) {
  const uint32_t limit = step_limit_.load(), now = moves_.load() + items_given();
  const uint32_t ticks = limit && now == *last ? still_.load() + 1 : 0;
  *last = now;
  if (ticks <= limit || lost()) {
    still_.store(ticks);
  } else if (waits_for_disk()) {
    still_.store(0);
  } else {
    give_reason(std::to_string(limit * kTickMillis / 1000));
    record(rank_, kStuck);
  }
}

void Segment::end() { header().ended.store(1); }
bool Segment::ended() const { return header().ended.load(); }
bool Segment::lost() const { return header().failure.load() || header().ended.load(); }

std::tuple<int, int, int, std::string> Segment::failure() const {
  const uint32_t code = header().failure.load();
  const int kind = static_cast<int>(code >> 16), rank = static_cast<int>(code & 0xffff);
  const std::string reason = kind == kReported || kind == kStuck ? seat(rank).reason : "";
  return {kind, rank, static_cast<int>(seat(rank).pid.load()), reason};
}

void Segment::watch() {
  std::vector<int> pidfds(size_, -1);
  std::vector<uint32_t> beats(size_, 0), still(size_, 0), gone(size_, 0);
  uint32_t lost_for = 0, moved = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  while (!leave_.wait_for(lock, std::chrono::milliseconds(kTickMillis), [this] { return leaving_; })) {
    // Time is counted in ticks of this thread: where a whole job was stopped and goes on, nobody has been silent.
    ticks_.fetch_add(1);
    seat(rank_).beat.fetch_add(1);
    for (int r = 0; r < size_; r++) {
      const int pid = static_cast<int>(seat(r).pid.load());
      if (r == rank_ || pid == 0 || seat(r).left.load()) continue;
      if (pidfds[r] < 0) pidfds[r] = open_pid(pid);
      const uint32_t beat = seat(r).beat.load();
      still[r] = beat == beats[r] ? still[r] + 1 : 0;
      beats[r] = beat;
      gone[r] = has_exited(pidfds[r]) ? gone[r] + 1 : 0;
      if (gone[r] > kGoneTicks) record(r, kGone);
      if (still[r] > patience_ticks_) record(r, kSilent);
    }
    watch_step(&moved);
    lost_for = lost() ? lost_for + 1 : 0;
    if (expendable_ && lost_for > kGraceTicks) _exit(header().failure.load() ? 1 : 0);
  }
  for (int fd : pidfds)
    if (fd >= 0) close(fd);
}

void Segment::wait(Word& word, Word& sleepers, uint32_t value, int rank, bool endless) {
  const auto ready = [&] { return reached(word.load(std::memory_order_acquire), value); };
  if (spin_then_yield(ready, spin_micros_)) return;
  const uint32_t start = ticks_.load();
  sleepers.fetch_add(1);
  while (!ready()) {
    advance();
    if (lost() || (!endless && ticks_.load() - start > kSlowTicks)) {
      sleepers.fetch_sub(1);
      if (!lost()) record(rank, kSlow);
      throw RankLost("a rank was lost");
    }
    const uint32_t seen = word.load();
    if (!reached(seen, value)) futex_wait(word, seen, kTickMillis);
  }
  sleepers.fetch_sub(1);
  advance();
}

struct alignas(128) SharedGroup::Line {
  Word posted;  // the step that this member has entered, its data in its slot
  Word sleepers;
};

SharedGroup::SharedGroup(Segment& segment, size_t offset, std::vector<int> members, int me)
    : segment_(segment),
      region_(segment.at(offset)),
      members_(std::move(members)),
      me_(me),
      size_(static_cast<int>(members_.size())) {
  if (me < 0 || me >= size_) throw std::invalid_argument("no such member");
  if (offset % 4096 || offset + region_bytes(size_) > segment.bytes())
    throw std::invalid_argument("the region is outside of the shared memory");
}

// Two slots a member are enough, without a second wait a step: who posts step k has read all of step k − 1, so when all
// have posted k − 1 the slots of step k − 2 are free for step k.
size_t SharedGroup::region_bytes(int members) {
  return static_cast<size_t>(round_up(members * static_cast<int64_t>(sizeof(Line)), 4096) + 2 * kSlotBytes * members);
}

SharedGroup::Line& SharedGroup::line(int member) const { return reinterpret_cast<Line*>(region_)[member]; }

char* SharedGroup::slot(int member, uint32_t step) const {
  const int64_t lines = round_up(size_ * static_cast<int64_t>(sizeof(Line)), 4096);
  return region_ + lines + (2 * member + (step & 1)) * kSlotBytes;
}

uint32_t SharedGroup::begin() {
  for (int m = 0; m < size_; m++) await(m, step_);
  return ++step_;
}

void SharedGroup::post(uint32_t step) {
  segment_.advance();
  Line& mine = line(me_);
  mine.posted.store(step);  // sequentially consistent, as is the sleeper's part: one of the two sees the other
  if (mine.sleepers.load()) futex_wake(mine.posted);
}

void SharedGroup::await(int member, uint32_t step, bool endless) {
  Line& theirs = line(member);
  if (!reached(theirs.posted.load(std::memory_order_acquire), step))
    segment_.wait(theirs.posted, theirs.sleepers, step, members_[member], endless);
}

void SharedGroup::all_reduce(char* x, int64_t count, int operation) {
  if (operation < kSumFloat || operation > kMaxFloat) throw std::invalid_argument("unknown operation");
  for (int64_t done = 0; done < count;) {
    const int64_t piece = std::min(count - done, kSlotBytes / 4);
    if (size_ > 2 && piece * 4 > kShareBytes)
      reduce_in_shares(x + done * 4, piece, operation);
    else
      reduce_by_all(x + done * 4, piece, operation);
    done += piece;
  }
}

// Everyone reads everything: one step.
void SharedGroup::reduce_by_all(char* x, int64_t count, int operation) {
  const uint32_t step = begin();
  std::memcpy(slot(me_, step), x, count * 4);
  post(step);
  for (int m = 0; m < size_; m++) {
    await(m, step);
    if (m == 0)
      std::memcpy(x, slot(m, step), count * 4);
    else
      combine(operation, x, slot(m, step), count);
  }
}

// Each member reduces its share of the elements in one step and hands it to the others in the next.
void SharedGroup::reduce_in_shares(char* x, int64_t count, int operation) {
  const auto first = [&](int m) { return m * round_up((count + size_ - 1) / size_, 16); };
  const auto from = [&](int m) { return std::min(count, first(m)); };
  uint32_t step = begin();
  std::memcpy(slot(me_, step), x, count * 4);
  post(step);
  for (int m = 0; m < size_; m++) await(m, step);
  const int64_t start = from(me_), mine = from(me_ + 1) - start;
  char* reduced = slot(me_, step + 1);
  std::memcpy(reduced, slot(0, step) + start * 4, mine * 4);
  for (int m = 1; m < size_; m++) combine(operation, reduced, slot(m, step) + start * 4, mine);
  step = begin();
  post(step);
  for (int m = 0; m < size_; m++) {
    await(m, step);
    std::memcpy(x + from(m) * 4, slot(m, step), (from(m + 1) - from(m)) * 4);
  }
}

void SharedGroup::all_gather(const char* x, char* out, int64_t rows, int64_t width) {
  const int64_t total = rows * width;
  for (int64_t done = 0; done < total;) {
    const int64_t piece = std::min(total - done, kSlotBytes);
    const uint32_t step = begin();
    std::memcpy(slot(me_, step), x + done, piece);
    post(step);
    for (int m = 0; m < size_; m++) {
      await(m, step);
      for (int64_t at = done; at < done + piece;) {  // up to the end of each row
        const int64_t row = at / width, column = at % width;
        const int64_t length = std::min(width - column, done + piece - at);
        std::memcpy(out + (row * size_ + m) * width + column, slot(m, step) + (at - done), length);
        at += length;
      }
    }
    done += piece;
  }
}

void SharedGroup::broadcast(char* data, int64_t bytes, bool endless) {
  for (int64_t done = 0; done < bytes;) {
    const int64_t piece = std::min(bytes - done, kSlotBytes);
    const uint32_t step = begin();
    if (me_ == 0) std::memcpy(slot(0, step), data + done, piece);
    post(step);
    if (me_ != 0) {
      await(0, step, endless);
      std::memcpy(data + done, slot(0, step), piece);
    }
    done += piece;
  }
}

}  // namespace eightfold
