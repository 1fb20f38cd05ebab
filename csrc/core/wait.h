// Waiting for another thread or process: busy while that may pay, then kind to whoever needs the core.
#pragma once

#include <sched.h>

#include <chrono>

namespace eightfold {

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Spins until `ready`, for about `micros`; says whether it became so. Between operations of one step only some tens of
// microseconds pass, which a sleeping thread would miss; a longer pause must not burn a core.
template <class Ready>
bool spin(Ready ready, int micros) {
  using clock = std::chrono::steady_clock;
  const auto until = clock::now() + std::chrono::microseconds(micros);
  do {
    for (int i = 0; i < 32; i++) {
      if (ready()) return true;
      pause_cpu();
    }
  } while (clock::now() < until);
  return ready();
}

constexpr int kYieldMicros = 100;

// For waits that end soon by nature: spins, then lets others have the core, some of whom it may be waiting for. Where
// this says false the caller should sleep: yielding alone does not move a scheduler that counts fairness in milliseconds.
template <class Ready>
bool spin_then_yield(Ready ready, int spin_micros) {
  using clock = std::chrono::steady_clock;
  if (ready() || (spin_micros > 0 && spin(ready, spin_micros))) return true;
  const auto until = clock::now() + std::chrono::microseconds(kYieldMicros);
  do {
    sched_yield();
    if (ready()) return true;
  } while (clock::now() < until);
  return false;
}

}  // namespace eightfold
