// SPDX-License-Identifier: Apache-2.0
#include <Python.h>

#include "clock.h"

#include <sys/prctl.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <mutex>

namespace emulated {
namespace {

double seconds_of(clockid_t which) {
  timespec t;
  clock_gettime(which, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}
double wall() { return seconds_of(CLOCK_MONOTONIC); }
double cpu() { return seconds_of(CLOCK_THREAD_CPUTIME_ID); }

std::atomic<bool> is_on{false};
Pace pace;

std::mutex clock_m;  // of the four below
double reached = 0;  // the clock when it was last looked at
double looked = 0;   // and the wall then
int pausers = 0;
double late = 0;

double now_locked() {
  double w = wall();
  if (!pausers) reached += (w - looked) / pace.slowdown;
  looked = w;
  return reached;
}

struct Blocked {
  Cause cause;
  double begin, end;
};

struct Thread {
  bool known = false;
  int depth = 0;
  double time = 0;      // virtual
  double cpu_mark = 0;  // CPU time up to which `time` counts
  double overslept = 0;  // by how much its last sleep ended late
  std::deque<Blocked> blocked;
};
thread_local Thread self;

std::mutex streams_m;
struct Stream : StreamTimes {
  double ready = 0;  // events that it waits for
};
std::map<int, Stream> streams;
int64_t syncs = 0;
std::map<std::string, std::array<double, 2>> by_kernel;

// The thread's time: its CPU work since the last look, or the clock if the thread was blocked meanwhile.
void catch_up() {
  double c = cpu(), n = clock_now();
  if (!self.known) prctl(PR_SET_TIMERSLACK, 1000UL);
  self.time = self.known ? self.time + (c - self.cpu_mark) * pace.python : n;
  if (n - self.time > pace.ahead + self.overslept) self.time = n;
  self.overslept = std::min(self.overslept, std::max(n - self.time, 0.0));
  self.cpu_mark = c;
  self.known = true;
}

// While the thread sleeps, others may need the interpreter's lock to end their pause.
class WithoutLock {
 public:
  WithoutLock() : state_(PyGILState_Check() ? PyEval_SaveThread() : nullptr) {}
  ~WithoutLock() {
    if (state_) PyEval_RestoreThread(state_);
  }

 private:
  PyThreadState* state_;
};

void sleep_until(double at) {
  WithoutLock unlocked;
  for (;;) {
    double left;
    bool stands;
    {
      std::lock_guard<std::mutex> l(clock_m);
      left = at - now_locked();
      stands = pausers > 0;
      if (left <= 0) {
        late -= left;
        self.overslept = -left;  // no real machine sleeps: later ones are shorter by it
        break;
      }
    }
    double s = std::max(left * pace.slowdown, stands ? 50e-6 : 1e-6);
    timespec t{time_t(s), long((s - double(time_t(s))) * 1e9)};
    nanosleep(&t, nullptr);
  }
  self.cpu_mark = cpu();
}

void note(Cause cause, double begin, double end) {
  if (end <= begin) return;
  self.blocked.push_back({cause, begin, end});
  if (self.blocked.size() > 256) self.blocked.pop_front();
}

// A stream without work in [begin, end) that its thread kept waiting: what was the thread doing?
void attribute(Stream& s, double begin, double end) {
  double left = end - begin;
  for (const auto& b : self.blocked) {
    double part = std::min(end, b.end) - std::max(begin, b.begin);
    if (part > 0) {
      s.idle[b.cause] += part;
      left -= part;
    }
  }
  s.idle[kLaunch] += std::max(left, 0.0);
}

double put(int stream, double seconds) {
  auto& s = streams[stream];
  double start = std::max({s.end, s.ready, self.time});
  double by_host = std::min(std::max(self.time, s.end), start);
  if (by_host > s.end) attribute(s, s.end, by_host);
  if (start > by_host) s.idle[kBus] += start - by_host;
  s.launches++;
  return s.end = start + seconds;
}

}  // namespace

void clock_start(const Pace& p) {
  std::lock_guard<std::mutex> l(clock_m);
  if (is_on) now_locked();
  pace = p;
  looked = wall();
  is_on = true;
}
bool clock_on() { return is_on; }

double clock_now() {
  std::lock_guard<std::mutex> l(clock_m);
  return now_locked();
}

double thread_time() {
  if (!self.depth) catch_up();
  return self.time;
}

Paused::Paused() {
  if (!is_on || self.depth++) return;
  catch_up();
  std::lock_guard<std::mutex> l(clock_m);
  now_locked();
  pausers++;
}

Paused::~Paused() {
  if (!is_on || --self.depth) return;
  {
    std::lock_guard<std::mutex> l(clock_m);
    now_locked();
    pausers--;
  }
  self.cpu_mark = cpu();
  if (self.time - clock_now() > pace.ahead) sleep_until(self.time);
}

void clock_sleep(double seconds) {
  Paused p;
  self.time += seconds;
}

double submit_kernel(int stream, double seconds, double launch) {
  Paused p;
  self.time += launch < 0 ? pace.launch : launch;
  std::lock_guard<std::mutex> l(streams_m);
  streams[stream].kernels += seconds;
  return put(stream, seconds);
}

double submit_copy(int stream, double seconds, bool blocking) {
  Paused p;
  self.time += pace.launch;
  std::lock_guard<std::mutex> l(streams_m);
  streams[stream].copies += seconds;
  streams[stream].idle[blocking ? kSync : kBus] += seconds;
  return put(stream, seconds);
}

double event_time(int stream) {
  Paused p;
  std::lock_guard<std::mutex> l(streams_m);
  auto& s = streams[stream];
  return std::max({s.end, s.ready, self.time});
}

void event_wait(int stream, double at) {
  std::lock_guard<std::mutex> l(streams_m);
  auto& s = streams[stream];
  s.ready = std::max(s.ready, at);
}

void thread_wait(double until, bool counts) {
  Paused p;
  note(kSync, self.time, until);
  self.time = std::max(self.time, until);
  std::lock_guard<std::mutex> l(streams_m);
  syncs += counts;
}

void note_blocked(Cause cause, double begin, double end) { note(cause, begin, end); }

double stream_end(int stream) {
  std::lock_guard<std::mutex> l(streams_m);
  auto& s = streams[stream];
  return std::max(s.end, s.ready);
}
StreamTimes stream_times(int stream) {
  std::lock_guard<std::mutex> l(streams_m);
  return streams[stream];
}
void clear_times() {
  std::lock_guard<std::mutex> l(streams_m);
  for (auto& [id, s] : streams) {
    s.kernels = s.copies = 0;
    s.idle.fill(0);
    s.launches = 0;
  }
  syncs = 0;
  by_kernel.clear();
  std::lock_guard<std::mutex> k(clock_m);
  late = 0;
}
int64_t sync_count() {
  std::lock_guard<std::mutex> l(streams_m);
  return syncs;
}
double lateness() {
  std::lock_guard<std::mutex> l(clock_m);
  return late;
}
void note_kernel(const std::string& name, double seconds) {
  std::lock_guard<std::mutex> l(streams_m);
  auto& k = by_kernel[name];
  k[0] += seconds;
  k[1] += 1;
}
std::map<std::string, std::array<double, 2>> seconds_by_kernel() {
  std::lock_guard<std::mutex> l(streams_m);
  return by_kernel;
}

}  // namespace emulated
