// Which copy of each kernel runs. Every kernel source is compiled once per level, inside the namespace SATEEN_ISA
// (`generic`, `avx2`, `avx512`, or `avx512_bf16`, which adds the VNNI and BF16 instructions);
// `SATEEN_DISPATCH(f, args)` calls the copy of the selected level.
//
// Kernel sources must not instantiate standard templates: the linker keeps one copy of an inline function, and it
// could be the one that was compiled for a processor this machine is not.
#pragma once

#include <string>

namespace sateen {

enum class Isa { generic, avx2, avx512, avx512_bf16 };  // in the order of kLevels in isa.cpp

Isa current_isa();
const char* isa_name(Isa level);
// Sets the level by name, or to the best one of this processor when empty; throws std::invalid_argument.
Isa select_isa(const std::string& name);

}  // namespace sateen

#ifdef SATEEN_X86
#define SATEEN_DECLARE(function, args) \
    namespace generic { void function(const args&); } \
    namespace avx2 { void function(const args&); } \
    namespace avx512 { void function(const args&); } \
    namespace avx512_bf16 { void function(const args&); }
#define SATEEN_DISPATCH(function, args)                                            \
    switch (sateen::current_isa()) {                                               \
        case sateen::Isa::avx512_bf16: sateen::avx512_bf16::function(args); break; \
        case sateen::Isa::avx512: sateen::avx512::function(args); break;           \
        case sateen::Isa::avx2: sateen::avx2::function(args); break;               \
        default: sateen::generic::function(args);                                  \
    }
#else
#define SATEEN_DECLARE(function, args) namespace generic { void function(const args&); }
#define SATEEN_DISPATCH(function, args) sateen::generic::function(args)
#endif
