// Compiled without level flags: the standard templates that a waiting thread needs live here.
#include <atomic>

namespace sateen {

void sleep_while(int* value, int seen) { std::atomic_ref<int>(*value).wait(seen); }

void wake_all(int* value) { std::atomic_ref<int>(*value).notify_all(); }

}  // namespace sateen
