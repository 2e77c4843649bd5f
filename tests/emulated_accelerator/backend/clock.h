// SPDX-License-Identifier: Apache-2.0
// The virtual clock of an emulated accelerator: streams take time instead of running jobs.
//
// Device time is wall time divided by a slowdown. The clock stands still while the emulation does work that no real
// machine would do. Every thread has a time of its own, which runs ahead by what its launches, its Python and its host
// kernels cost; the thread sleeps the lead off. So locks, queues and lanes of the program keep their meaning.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace emulated {

enum Cause { kSync, kBus, kHost, kLaunch, kCauses };  // why a stream had nothing to do

// What the clock itself needs of a profile; seconds.
struct Pace {
  double slowdown = 10;
  double launch = 5e-6;   // the launching thread's time for one operator, below Python
  double python = 1;      // virtual seconds per CPU second of a thread outside the emulation
  double ahead = 1e-4;    // a thread may run ahead of the clock by this much before it sleeps
};

struct StreamTimes {
  double end = 0;                        // of the last thing submitted
  double kernels = 0, copies = 0;        // seconds of work
  std::array<double, kCauses> idle{};    // seconds without a kernel, by cause
  int64_t launches = 0;
};

void clock_start(const Pace& pace);
bool clock_on();

double clock_now();          // the clock, seconds
double thread_time();        // the calling thread's own time, at least the clock's
void clock_sleep(double seconds);  // host work that takes virtual time, and nothing else

// The emulation's own work: the clock stands still, and the thread's CPU time does not count. May nest.
class Paused {
 public:
  Paused();
  ~Paused();  // then the thread sleeps off what it owes
  Paused(const Paused&) = delete;
};

// All of these are called while paused, or pause by themselves.
double submit_kernel(int stream, double seconds, double launch = -1);  // returns its end
double submit_copy(int stream, double seconds, bool blocking);  // over PCIe; `blocking`: the thread waits next
double event_time(int stream);                                  // of an event recorded now
void event_wait(int stream, double at);                         // the stream goes on after `at`
void thread_wait(double until, bool counts);                    // a synchronize; whether sync_count counts it
void note_blocked(Cause cause, double begin, double end);       // the thread was blocked for another reason

double stream_end(int stream);
StreamTimes stream_times(int stream);
void clear_times();   // counters begin anew; streams keep their ends
int64_t sync_count(); // synchronizations that counted since clear_times
double lateness();    // virtual seconds by which sleeps ended late since clear_times
std::map<std::string, std::array<double, 2>> seconds_by_kernel();  // name -> {seconds, calls} since clear_times
void note_kernel(const std::string& name, double seconds);

}  // namespace emulated
