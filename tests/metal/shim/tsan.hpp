// The interface of ThreadSanitizer to fibers; without it, functions that do nothing.
//
// The kernel is built with ThreadSanitizer, this file never is: what counts are the
// kernel's own accesses, and the order that its barriers give them.
#pragma once

#if defined(SHIM_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
constexpr bool tsan = true;
#else
constexpr bool tsan = false;
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void __tsan_destroy_fiber(void*) {}
inline void __tsan_switch_to_fiber(void*, unsigned) {}
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif
