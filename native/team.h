// The threads of one parallel region, working through phases: units of a phase go to whoever is free, so that a thread
// which the machine holds up delays the others by one unit, and all meet at the end of the phase.
#pragma once

#include "decode.h"
#include "simd.h"

namespace sateen {

// Blocks the calling thread while `*value` is `seen`.
void sleep_while(int* value, int seen);
void wake_all(int* value);

namespace SATEEN_ISA {
namespace {

// About 10 microseconds, the time of a unit: most meetings are over by then. A thread that waits longer waits for one
// that the machine holds up, and had better leave its processor: with other programs on two cores, 2000 turns doubled
// the processor time of a step.
constexpr int kSpins = 500;

SATEEN_INLINE void pause() {
#ifdef SATEEN_X86
    __builtin_ia32_pause();
#endif
}

struct Team {
    Meeting* meeting;
    int* next_unit;  // one counter per phase, zero before; every thread takes them in the same order
    int size;

    void meet() {
        if (size == 1) return;
        const int round = __atomic_load_n(&meeting->round, __ATOMIC_ACQUIRE);
        if (__atomic_add_fetch(&meeting->arrived, 1, __ATOMIC_ACQ_REL) == size) {
            __atomic_store_n(&meeting->arrived, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&meeting->round, round + 1, __ATOMIC_SEQ_CST);
            wake_all(&meeting->round);
            return;
        }
        for (int i = 0; i < kSpins; ++i) {
            if (__atomic_load_n(&meeting->round, __ATOMIC_ACQUIRE) != round) return;
            pause();
        }
        sleep_while(&meeting->round, round);
    }

    // work(i) for every unit i, by some thread; returns when all are done.
    template <typename Work>
    void share(long units, Work work) {
        int* const next = next_unit++;
        for (long i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < units;) work(i);
        meet();
    }
};

}  // namespace
}  // namespace SATEEN_ISA
}  // namespace sateen
