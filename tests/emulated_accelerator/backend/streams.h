// SPDX-License-Identifier: Apache-2.0
// Streams and events. What a stream is given runs later, on a thread of its own, or takes time on a clock.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

namespace emulated {

constexpr int kStreams = 64;  // of a process; 0 is the default stream of every device

enum class Kind { op, copy, up, down, poison, event, host };

// What a stream is given. `name` and the rest are for who counts or takes time instead of running it.
struct Work {
  Kind kind;
  std::function<void()> run;
  std::string name = {};
  int64_t bytes = 0;    // of a copy
  bool pinned = false;  // whether a copy's host side is page-locked
  std::function<void()> finish = {};  // what runs even where a clock replaces `run`
  const c10::OperatorHandle* op = nullptr;
  const std::vector<c10::IValue>* args = nullptr;  // an operator's, on the device; valid during `submit`
  const std::vector<c10::IValue>* outs = nullptr;
  const at::Tensor* source = nullptr;  // a copy's
  const at::Tensor* target = nullptr;
  bool blocking = false;  // whether the caller waits for the copy next
};

struct Event {
  std::mutex m;
  std::condition_variable changed;
  uint64_t scheduled = 0, done = 0;
  int stream = 0;         // that it was recorded on last
  uint64_t position = 0;  // there
  int64_t at_ns = 0;      // when it was reached
};
using EventPtr = std::shared_ptr<Event>;

// Who carries work out. One for the whole process.
class Executor {
 public:
  virtual ~Executor() = default;
  virtual void submit(int stream, Work work) = 0;
  virtual void record(const EventPtr& event, int stream) = 0;
  virtual void wait(const EventPtr& event, int stream) = 0;
  virtual void synchronize(int stream) = 0;
  virtual void synchronize(const EventPtr& event) = 0;
  virtual bool reached(const EventPtr& event) = 0;
  virtual bool idle(int stream) = 0;
};
void set_executor(Executor* executor);  // before any work; nullptr: threads
Executor& executor();

inline void submit(int stream, Work work) { executor().submit(stream, std::move(work)); }
inline void record(const EventPtr& event, int stream) { executor().record(event, stream); }
inline void wait(const EventPtr& event, int stream) { executor().wait(event, stream); }
// The calling thread waits, and the counters note why. Raises what an operator on the stream raised.
void synchronize(int stream, const char* why);
void synchronize(const EventPtr& event);
void synchronize_all();

// The calling thread's.
int current_stream();
void set_current_stream(int stream);
int current_device();
void set_current_device(int device);

// -- how threads run their streams ---------------------------------------------------------------------------------

// Sleep about so long before each job, at random.
void set_delay(int stream, int microseconds);
// Run only what somebody waits for: another stream, or a thread of the host.
void set_lazy(int stream, bool lazy);
// Give all streams one queue in the order of submission, as a device with one hardware queue does.
void set_one_queue(bool one);
// What each stream that has work left is doing, for the report of a hang.
std::map<int, std::string> unfinished();

// -- counters ------------------------------------------------------------------------------------------------------

// (id of the thread, kind, name) -> how often. Kinds: "launch", "synchronize", "pageable".
using Counts = std::map<std::tuple<int64_t, std::string, std::string>, int64_t>;
void count(const std::string& kind, const std::string& name);
Counts counts();
void reset_counts();

}  // namespace emulated
