// Run-time choice of the instruction set.
//
// A kernel is a struct with one always-inlined `run`. Each wrapper below compiles that body for one
// instruction set, and `compiled_for` picks the wrapper. Floating-point contraction is off in the
// whole build, so every instruction set computes the same bits.
#pragma once

#include <cstring>

#define FASTOPT_INLINE_LAMBDA __attribute__((always_inline))
#define FASTOPT_INLINE inline FASTOPT_INLINE_LAMBDA

#if defined(__x86_64__) && \
    (defined(__clang__) ? __clang_major__ >= 17 : defined(__GNUC__) && __GNUC__ >= 12)
#define FASTOPT_X86_LEVELS 1
#else
#define FASTOPT_X86_LEVELS 0
#endif

namespace fastopt {

enum class Isa { baseline, x86_64_v3, x86_64_v4 };

inline constexpr Isa kIsas[] = {Isa::baseline, Isa::x86_64_v3, Isa::x86_64_v4};

inline const char* name(Isa isa) {
  switch (isa) {
    case Isa::x86_64_v4: return "x86-64-v4";
    case Isa::x86_64_v3: return "x86-64-v3";
    default: return "baseline";
  }
}

// Whether this build has the instruction set and this processor runs it.
inline bool supported(Isa isa) {
#if FASTOPT_X86_LEVELS
  switch (isa) {
    case Isa::x86_64_v4: return __builtin_cpu_supports("x86-64-v4");
    case Isa::x86_64_v3: return __builtin_cpu_supports("x86-64-v3");
    default: return true;
  }
#else
  return isa == Isa::baseline;
#endif
}

template <class Kernel, class Signature = decltype(Kernel::run)>
struct Compiled;

template <class Kernel, class Result, class... Args>
struct Compiled<Kernel, Result(Args...)> {
  static Result baseline(Args... args) { return Kernel::run(args...); }
#if FASTOPT_X86_LEVELS
  __attribute__((target("arch=x86-64-v3"))) static Result x86_64_v3(Args... args) {
    return Kernel::run(args...);
  }
  __attribute__((target("arch=x86-64-v4"))) static Result x86_64_v4(Args... args) {
    return Kernel::run(args...);
  }
#endif
};

// `Wide` is the kernel for instruction sets with vectors of 32 bytes, where it is another one.
template <class Kernel, class Wide = Kernel>
constexpr auto compiled_for([[maybe_unused]] Isa isa) {
#if FASTOPT_X86_LEVELS
  if (isa == Isa::x86_64_v4) return &Compiled<Wide>::x86_64_v4;
  if (isa == Isa::x86_64_v3) return &Compiled<Wide>::x86_64_v3;
#endif
  return &Compiled<Kernel>::baseline;
}

}  // namespace fastopt
