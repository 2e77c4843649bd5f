// SPDX-License-Identifier: Apache-2.0
#include "streams.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <deque>
#include <random>
#include <thread>

namespace emulated {
namespace {

thread_local int stream_here = 0;
thread_local int device_here = 0;

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// One thread that works through jobs in order. Never destroyed: a thread may outlive what a process tears down.
class Queue {
 public:
  explicit Queue(int stream) : random_(1234 + stream) {
    std::thread([this] { work(); }).detach();
  }

  uint64_t put(Work work) {
    std::lock_guard<std::mutex> lock(m_);
    jobs_.push_back(std::move(work));
    submitted_++;
    if (!lazy) demanded_ = submitted_;
    more_.notify_one();
    return submitted_;
  }
  void demand(uint64_t position) {
    std::lock_guard<std::mutex> lock(m_);
    if (position > demanded_) {
      demanded_ = position;
      more_.notify_one();
    }
  }
  void synchronize() {
    std::unique_lock<std::mutex> lock(m_);
    uint64_t upto = submitted_;
    demanded_ = upto;
    more_.notify_one();
    waiting_++;
    done_.wait(lock, [&] { return completed_ >= upto; });
    waiting_--;
    if (error_) {
      auto error = error_;
      error_ = nullptr;
      std::rethrow_exception(error);
    }
  }
  bool idle() {
    std::lock_guard<std::mutex> lock(m_);
    demanded_ = submitted_;  // who asks again and again waits
    more_.notify_one();
    return completed_ >= submitted_;
  }
  std::string doing() {
    std::lock_guard<std::mutex> lock(m_);
    if (completed_ >= submitted_) return "";
    return (running_.empty() ? "nothing" : running_) + ", and " + std::to_string(jobs_.size()) + " more wait";
  }

  std::atomic<int> delay_us{0};
  std::atomic<bool> lazy{false};

 private:
  void work() {
    at::AutoDispatchBelowADInplaceOrView below;
    at::NoGradGuard no_grad;
    for (;;) {
      Work job;
      {
        std::unique_lock<std::mutex> lock(m_);
        more_.wait(lock, [&] { return !jobs_.empty() && completed_ < demanded_; });
        job = std::move(jobs_.front());
        jobs_.pop_front();
        running_ = job.name.empty() ? "an event" : job.name;
      }
      if (int delay = delay_us) {
        int at_random = delay / 2 + int(random_() % (delay + 1));
        std::this_thread::sleep_for(std::chrono::microseconds(at_random));
      }
      try {
        job.run();
        if (job.finish) job.finish();
      } catch (...) {
        std::lock_guard<std::mutex> lock(m_);
        if (!error_) error_ = std::current_exception();
      }
      job = {};  // its tensors go before anybody learns that it is done
      std::lock_guard<std::mutex> lock(m_);
      running_.clear();
      completed_++;
      if (waiting_) done_.notify_all();
    }
  }

  std::mutex m_;
  std::condition_variable more_, done_;
  int waiting_ = 0;
  std::deque<Work> jobs_;
  uint64_t submitted_ = 0, demanded_ = 0, completed_ = 0;
  std::string running_;
  std::exception_ptr error_;
  std::mt19937 random_;
};

std::mutex queues_guard;
std::array<Queue*, kStreams> queues;
std::atomic<bool> one_queue{false};

Queue& queue_of(int stream) {
  std::lock_guard<std::mutex> lock(queues_guard);
  Queue*& queue = queues[one_queue ? 0 : stream];
  if (!queue) queue = new Queue(stream);
  return *queue;
}

class Threads final : public Executor {
 public:
  Threads() {
    pthread_atfork(nullptr, nullptr, [] { queues.fill(nullptr); });  // threads do not survive a fork
  }
  void submit(int stream, Work work) override { queue_of(stream).put(std::move(work)); }

  void record(const EventPtr& event, int stream) override {
    // Both under the event's lock: who waits in between would otherwise miss the position.
    std::lock_guard<std::mutex> lock(event->m);
    uint64_t value = ++event->scheduled;
    event->stream = stream;
    event->position = queue_of(stream).put({Kind::event, [event, value] {
                                              std::lock_guard<std::mutex> lock(event->m);
                                              event->done = std::max(event->done, value);
                                              event->at_ns = now_ns();
                                              event->changed.notify_all();
                                            }});
  }
  void wait(const EventPtr& event, int stream) override {
    auto [value, from, position] = last(event);
    if (!value) return;
    queue_of(stream).put({Kind::event, [event, value = value, from = from, position = position] {
                            queue_of(from).demand(position);
                            std::unique_lock<std::mutex> lock(event->m);
                            event->changed.wait(lock, [&] { return event->done >= value; });
                          }});
  }
  void synchronize(int stream) override { queue_of(stream).synchronize(); }
  void synchronize(const EventPtr& event) override {
    auto [value, from, position] = last(event);
    if (!value) return;
    queue_of(from).demand(position);
    std::unique_lock<std::mutex> lock(event->m);
    event->changed.wait(lock, [&, value = value] { return event->done >= value; });
  }
  bool reached(const EventPtr& event) override {
    auto [value, from, position] = last(event);
    if (!value) return true;
    queue_of(from).demand(position);
    std::lock_guard<std::mutex> lock(event->m);
    return event->done >= value;
  }
  bool idle(int stream) override { return queue_of(stream).idle(); }

 private:
  static std::tuple<uint64_t, int, uint64_t> last(const EventPtr& event) {
    std::lock_guard<std::mutex> lock(event->m);
    return {event->scheduled, event->stream, event->position};
  }
};

Executor* chosen = nullptr;

std::mutex counts_guard;
Counts counted;

}  // namespace

void set_executor(Executor* executor) { chosen = executor; }
Executor& executor() {
  static Threads* threads = new Threads();
  return chosen ? *chosen : *threads;
}

void synchronize(int stream, const char* why) {
  count("synchronize", why);
  executor().synchronize(stream);
}
void synchronize(const EventPtr& event) {
  count("synchronize", "event");
  executor().synchronize(event);
}
void synchronize_all() {
  count("synchronize", "device");
  std::vector<int> used;
  {
    std::lock_guard<std::mutex> lock(queues_guard);
    for (int stream = 0; stream < kStreams; stream++)
      if (chosen || queues[stream]) used.push_back(stream);
  }
  for (int stream : used) executor().synchronize(stream);
}

int current_stream() { return stream_here; }
void set_current_stream(int stream) { stream_here = stream; }
int current_device() { return device_here; }
void set_current_device(int device) { device_here = device; }

void set_delay(int stream, int microseconds) { queue_of(stream).delay_us = microseconds; }
void set_lazy(int stream, bool lazy) {
  queue_of(stream).lazy = lazy;
  if (!lazy) queue_of(stream).idle();
}
void set_one_queue(bool one) { one_queue = one; }
std::map<int, std::string> unfinished() {
  std::map<int, std::string> found;
  std::lock_guard<std::mutex> lock(queues_guard);
  for (int stream = 0; stream < kStreams; stream++)
    if (queues[stream])
      if (std::string doing = queues[stream]->doing(); !doing.empty()) found[stream] = doing;
  return found;
}

void count(const std::string& kind, const std::string& name) {
  std::lock_guard<std::mutex> lock(counts_guard);
  counted[{int64_t(syscall(SYS_gettid)), kind, name}]++;
}
Counts counts() {
  std::lock_guard<std::mutex> lock(counts_guard);
  return counted;
}
void reset_counts() {
  std::lock_guard<std::mutex> lock(counts_guard);
  counted.clear();
}

}  // namespace emulated
