// SPDX-License-Identifier: Apache-2.0
// Memory of the emulated device, which the host cannot touch, and page-locked memory of the host.
#pragma once

#include <c10/core/Allocator.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>

namespace emulated {

// A device address lies in a window that nobody may read or write. The device's own threads add a constant and use a
// second window. So a host that touches device memory dies at once, and no protection is ever switched.
bool on_device(const void* address);
char* device_view(const void* address);

c10::Allocator* device_allocator();
c10::Allocator* pinned_allocator();
bool is_pinned(const void* address);

// Let the block that holds `data` be reused only after what `stream` has been given so far.
void record_stream(const c10::DataPtr& data, int stream);

struct Usage {
  int64_t now = 0, peak = 0;
};
std::map<std::string, Usage> device_usage();  // by owner; the sum under ""
Usage pinned_usage();
void reset_peaks();

// Blocks taken from now on belong to `owner`, whichever thread takes them.
void set_owner(const std::string& owner);
// Raise torch.OutOfMemoryError when more would be in use; 0: no limit.
void set_capacity(int64_t bytes);
// Call this with the address of every block that is handed out; nullptr: nothing.
void tell_of_blocks(void (*told)(const void*));
// Overwrite fresh and freed blocks with NaN, in the order of the stream that owns them.
void set_poison(bool on);

}  // namespace emulated
