#include "tests/allocation_count.h"

#include <cstdlib>
#include <new>

namespace {
thread_local int64_t t_allocations = 0;

void* Counted(void* memory) {
  ++t_allocations;
  if (memory == nullptr) std::abort();
  return memory;
}
}  // namespace

void* operator new(size_t bytes) { return Counted(std::malloc(bytes)); }
// Without this one a sanitizer's own would meet our delete (std::stable_sort asks for it).
void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return Counted(std::malloc(bytes)); }
void* operator new(size_t bytes, std::align_val_t alignment) {
  const size_t unit = static_cast<size_t>(alignment);
  return Counted(std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

int64_t atp::AllocationsOfThisThread() { return t_allocations; }
