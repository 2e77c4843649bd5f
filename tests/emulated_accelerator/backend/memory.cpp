// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "streams.h"

namespace emulated {
namespace {

constexpr size_t kSpace = size_t(1) << 38;  // bytes of address space; what is not touched costs nothing
constexpr size_t kGrain = 512;              // as CUDA's caching allocator
constexpr size_t kPage = 4096;

char* map_window(int protection) {
  void* at = mmap(nullptr, kSpace, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TORCH_CHECK(at != MAP_FAILED, "emulated device: no address space for its memory");
  return static_cast<char*>(at);
}
char* forbidden() {
  static char* const window = map_window(PROT_NONE);
  return window;
}
char* usable() {
  static char* const window = map_window(PROT_READ | PROT_WRITE);
  return window;
}

struct Block {
  size_t size;
  int stream;
  std::string owner;
  std::vector<int> used_on;
};

std::mutex guard;  // of everything below
std::unordered_map<char*, Block> live;
std::map<std::pair<int, size_t>, std::vector<char*>> reusable;  // by stream and size
size_t never_used = kPage;
std::map<std::string, Usage> usage;
std::string owner_now;
int64_t capacity = 0;
std::atomic<bool> poisons{true};
std::atomic<void (*)(const void*)> tell{nullptr};

void count(const std::string& owner, int64_t bytes) {
  for (const std::string& name : {std::string(), owner}) {
    Usage& of = usage[name];
    of.now += bytes;
    of.peak = std::max(of.peak, of.now);
    if (owner.empty()) break;
  }
}

void poison(char* at, size_t size, int stream) {
  if (poisons) submit(stream, {Kind::poison, [at, size] { std::memset(device_view(at), 0xff, size); }});
}

void free_block(void* address) {
  char* at = static_cast<char*>(address);
  Block block;
  {
    std::lock_guard<std::mutex> lock(guard);
    auto found = live.find(at);
    block = std::move(found->second);
    live.erase(found);
    count(block.owner, -int64_t(block.size));
  }
  for (int other : block.used_on) {
    if (other == block.stream) continue;
    auto done = std::make_shared<Event>();
    record(done, other);
    wait(done, block.stream);
  }
  poison(at, block.size, block.stream);
  std::lock_guard<std::mutex> lock(guard);
  reusable[{block.stream, block.size}].push_back(at);
}

class DeviceAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    c10::Device device(c10::DeviceType::PrivateUse1, current_device());
    if (!bytes) return {nullptr, nullptr, &c10::detail::deleteNothing, device};
    size_t size = (bytes + kGrain - 1) / kGrain * kGrain;
    int stream = current_stream();
    char* at;
    bool fresh = false;
    {
      std::lock_guard<std::mutex> lock(guard);
      TORCH_CHECK_WITH(OutOfMemoryError, !capacity || usage[""].now + int64_t(size) <= capacity,
                       "emulated device: out of memory; ", size, " bytes wanted, ", usage[""].now, " of ", capacity,
                       " in use");
      std::vector<char*>& free_ones = reusable[{stream, size}];
      if (!free_ones.empty()) {
        at = free_ones.back();
        free_ones.pop_back();
      } else {
        TORCH_CHECK(never_used + size < kSpace, "emulated device: its address space is used up");
        at = forbidden() + never_used;
        never_used += size;
        fresh = true;
      }
      live[at] = Block{size, stream, owner_now, {}};
      count(owner_now, int64_t(size));
    }
    if (fresh) poison(at, size, stream);
    if (auto told = tell.load()) told(at);
    return {at, at, &free_block, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    submit(current_stream(),
           {Kind::copy, [=] { std::memcpy(device_view(to), device_view(from), bytes); }, "copy", 2 * int64_t(bytes)});
  }
};

std::map<char*, size_t> pinned;
Usage pinned_now;

void unpin(void* address) {
  {
    std::lock_guard<std::mutex> lock(guard);
    auto found = pinned.find(static_cast<char*>(address));
    pinned_now.now -= int64_t(found->second);
    pinned.erase(found);
  }
  std::free(address);
}

class PinnedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, nullptr, &c10::detail::deleteNothing, c10::Device(c10::kCPU)};
    size_t size = std::bit_ceil(bytes);  // as torch's allocator for CUDA takes it
    void* at = nullptr;
    TORCH_CHECK(!posix_memalign(&at, kPage, size), "no host memory for ", size, " page-locked bytes");
    std::lock_guard<std::mutex> lock(guard);
    pinned[static_cast<char*>(at)] = size;
    pinned_now.now += int64_t(size);
    pinned_now.peak = std::max(pinned_now.peak, pinned_now.now);
    return {at, at, &unpin, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

}  // namespace

bool on_device(const void* address) { return address >= forbidden() && address < forbidden() + kSpace; }
char* device_view(const void* address) {
  return usable() + (static_cast<const char*>(address) - forbidden());
}

c10::Allocator* device_allocator() {
  static DeviceAllocator allocator;
  return &allocator;
}
c10::Allocator* pinned_allocator() {
  static PinnedAllocator allocator;
  return &allocator;
}
bool is_pinned(const void* address) {
  std::lock_guard<std::mutex> lock(guard);
  auto after = pinned.upper_bound(static_cast<char*>(const_cast<void*>(address)));
  if (after == pinned.begin()) return false;
  --after;
  return address < after->first + after->second;
}

void record_stream(const c10::DataPtr& data, int stream) {
  std::lock_guard<std::mutex> lock(guard);
  auto found = live.find(static_cast<char*>(data.get()));
  if (found != live.end()) found->second.used_on.push_back(stream);
}

std::map<std::string, Usage> device_usage() {
  std::lock_guard<std::mutex> lock(guard);
  return usage;
}
Usage pinned_usage() {
  std::lock_guard<std::mutex> lock(guard);
  return pinned_now;
}
void reset_peaks() {
  std::lock_guard<std::mutex> lock(guard);
  for (auto& [owner, of] : usage) of.peak = of.now;
  pinned_now.peak = pinned_now.now;
}
void set_owner(const std::string& owner) {
  std::lock_guard<std::mutex> lock(guard);
  owner_now = owner;
}
void set_capacity(int64_t bytes) {
  std::lock_guard<std::mutex> lock(guard);
  capacity = bytes;
}
void tell_of_blocks(void (*told)(const void*)) { tell = told; }
void set_poison(bool on) { poisons = on; }

}  // namespace emulated
