// For LD_PRELOAD, by test_failures.py: memory that fastopt's extension asks `operator new` for runs
// out at the n-th time.
#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

std::atomic<long> left{-1}, asked{0};

bool of_the_extension(void* caller) {
  Dl_info info;
  return dladdr(caller, &info) && info.dli_fname && std::strstr(info.dli_fname, "/fastopt/_C.");
}

void* allocate(size_t size, size_t alignment, void* caller) {
  if (left >= 0 && of_the_extension(caller)) {
    ++asked;
    if (left-- == 0) throw std::bad_alloc();
  }
  void* memory = alignment ? std::aligned_alloc(alignment, (size + alignment - 1) & -alignment)
                           : std::malloc(size ? size : 1);
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace

// The n-th allocation from now on fails, once.
extern "C" void fail_at(long n) {
  asked = 0;
  left = n;
}
// How many there were since.
extern "C" long allocations() { return asked; }

#define CALLER __builtin_return_address(0)
void* operator new(size_t size) { return allocate(size, 0, CALLER); }
void* operator new[](size_t size) { return allocate(size, 0, CALLER); }
void* operator new(size_t size, std::align_val_t a) { return allocate(size, size_t(a), CALLER); }
void* operator new[](size_t size, std::align_val_t a) { return allocate(size, size_t(a), CALLER); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
