#include "isa.h"

#include <stdexcept>

namespace sateen {
namespace {

constexpr Isa kLevels[] = {Isa::generic, Isa::avx2, Isa::avx512};

bool supported(Isa level) {
#ifdef SATEEN_X86
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    if (level == Isa::avx2) return v3;
    if (level == Isa::avx512)
        return v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
#endif
    return level == Isa::generic;
}

Isa best() {
    Isa found = Isa::generic;
    for (Isa level : kLevels)
        if (supported(level)) found = level;
    return found;
}

Isa selected = best();

}  // namespace

Isa current_isa() { return selected; }

const char* isa_name(Isa level) {
    return level == Isa::avx512 ? "avx512" : level == Isa::avx2 ? "avx2" : "generic";
}

Isa select_isa(const std::string& name) {
    if (name.empty()) return selected = best();
    for (Isa level : kLevels) {
        if (name != isa_name(level)) continue;
        if (!supported(level))
            throw std::invalid_argument("this processor cannot run it; its best level is " + std::string(isa_name(best())));
        return selected = level;
    }
    throw std::invalid_argument("not an instruction set; known: generic, avx2, avx512 (unset: the best this processor has)");
}

}  // namespace sateen
