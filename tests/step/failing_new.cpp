// For LD_PRELOAD, by test_failures.py: memory that fastopt's extension asks `operator new` for runs
// out at the n-th time.
#include <link.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

std::atomic<long> left{-1}, asked{0};

// What pybind11 registers a new object with, where it catches nothing: the process would end.
constexpr size_t kRegistration = 24;

// Where the extension's code is.
uintptr_t first = 0, last = 0;

int find(dl_phdr_info* info, size_t, void*) {
  if (!std::strstr(info->dlpi_name, "/fastopt/_C.")) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)& part = info->dlpi_phdr[i];
    if (part.p_type != PT_LOAD || !(part.p_flags & PF_X)) continue;
    first = info->dlpi_addr + part.p_vaddr;
    last = first + part.p_memsz;
  }
  return 1;
}

void* allocate(size_t size, size_t alignment, uintptr_t caller) {
  if (left >= 0 && size != kRegistration && first <= caller && caller < last) {
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
  if (!first) dl_iterate_phdr(find, nullptr);
  asked = 0;
  left = n;
}
// How many there were since.
extern "C" long allocations() { return asked; }

#define CALLER reinterpret_cast<uintptr_t>(__builtin_return_address(0))
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
