#include "isa.h"

#include <stdexcept>

namespace sateen {
namespace {

struct Level {
    Isa isa;
    const char* name;
};

constexpr Level kLevels[] = {
    {Isa::generic, "generic"}, {Isa::avx2, "avx2"}, {Isa::avx512, "avx512"}, {Isa::avx512_bf16, "avx512_bf16"}};

bool supported(Isa level) {
#ifdef SATEEN_X86
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (level == Isa::avx2) return v3;
    if (level == Isa::avx512) return v4;
    if (level == Isa::avx512_bf16)
        return v4 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#endif
    return level == Isa::generic;
}

Isa best() {
    Isa found = Isa::generic;
    for (const Level& level : kLevels)
        if (supported(level.isa)) found = level.isa;
    return found;
}

Isa selected = best();

}  // namespace

Isa current_isa() { return selected; }

const char* isa_name(Isa level) { return kLevels[int(level)].name; }

Isa select_isa(const std::string& name) {
    if (name.empty()) return selected = best();
    std::string known;
    for (const Level& level : kLevels) {
        known += (known.empty() ? "" : ", ") + std::string(level.name);
        if (name != level.name) continue;
        if (!supported(level.isa))
            throw std::invalid_argument("this processor cannot run it; its best level is " + std::string(isa_name(best())));
        return selected = level.isa;
    }
    throw std::invalid_argument("not an instruction set; known: " + known + " (unset: the best this processor has)");
}

}  // namespace sateen
