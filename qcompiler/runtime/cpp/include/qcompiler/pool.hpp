/// @file
/// C++17 interface of a pool of sessions: header only, over qcompiler/pool.h, whose rules hold here too.
///
///     qcompiler::SessionPool pool("model.so", {2});                 // two streams of one thread
///     std::future<void> done = pool.submit({pixels}, {logits});     // a pointer per input and per output, in order; they stay the caller's
///     done.get();                                                   // throws Error when the run failed
///
/// Link with ${CMAKE_DL_LIBS} and Threads::Threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "qcompiler/pool.h"
#include "qcompiler/qcompiler.hpp"

namespace qcompiler {

/// How a pool runs.
struct PoolOptions {
  int streams = 1;   ///< sessions that run at the same time
  int threads = 1;   ///< threads of each session
  int waiting = 0;   ///< requests that may wait; 0: two per stream, with a deadline two of the largest batches per stream
  bool pin = false;  ///< keep each stream on CPUs of its own
  std::optional<double> deadline = {};  ///< of a library for several batches: seconds (above 0) that a request of the least may wait for others to run with
};

/// Sessions on one library, which share its code and weights, fed from one queue. Safe to use from any number of threads; not movable.
class SessionPool {
 public:
  /// Open the library at `path`. Throws Error as Session does, and Error(QC_ERROR_ARGUMENT) for options out of range.
  explicit SessionPool(const std::string& path, PoolOptions options = {}) : SessionPool(std::make_shared<detail::Library>(path), options) {}
  /// A pool on a network that is linked to this program; see Session::linked.
  SessionPool(const qc_library& linked, PoolOptions options) : SessionPool(std::make_shared<detail::Library>(linked), options) {}
  /// Closes it.
  ~SessionPool() { qc_pool_destroy(pool_); }
  SessionPool(const SessionPool&) = delete;
  SessionPool& operator=(const SessionPool&) = delete;

  /// Ask for one run. Waits while the queue is full. The buffers must live until the future is ready; it throws Error when the run failed.
  /// Throws Error(QC_ERROR_STATE) when the pool is closed, Error(QC_ERROR_SIZE) for a wrong number of pointers.
  /// then: called in the stream's thread when the run has succeeded, before the future is ready, which throws what it throws; it must not close the pool.
  std::future<void> submit(const std::vector<const void*>& inputs, const std::vector<void*>& outputs, std::function<void()> then = {}) {
    return enter(inputs, outputs, qc_pool_submit, std::move(then));
  }
  /// The same at the shapes that the inputs have, one for each, in order, of a library for several: compiled ones, or such as it pads. Buffers are as long as
  /// those say. The future throws Error(QC_ERROR_SIZE) for any other shape; Error(QC_ERROR_SIZE) is thrown at once for a wrong number of them.
  std::future<void> submit_at(const std::vector<std::vector<std::int64_t>>& shapes, const std::vector<const void*>& inputs, const std::vector<void*>& outputs,
                              std::function<void()> then = {}) {
    const std::vector<const qc_tensor_info*> known = this->inputs();
    if (shapes.size() != known.size())
      throw Error(QC_ERROR_SIZE, "submit_at: " + std::to_string(shapes.size()) + " shapes given; the library has " + std::to_string(known.size()) + " inputs");
    std::vector<qc_shape> given(shapes.size());
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      given[i].name = known[i]->name;
      given[i].rank = static_cast<std::int32_t>(shapes[i].size());
      for (std::size_t a = 0; a < shapes[i].size() && a < QC_MAX_RANK; ++a) given[i].shape[a] = shapes[i][a];
    }
    const auto submit = [&given](qc_pool* pool, const void* const* in, void* const* out, qc_pool_done done, void* user) {
      return qc_pool_submit_at(pool, given.data(), in, out, done, user);
    };
    return enter(inputs, outputs, submit, std::move(then));
  }
  /// The same without waiting: throws Error(QC_ERROR_BUSY) when the queue is full.
  std::future<void> try_submit(const std::vector<const void*>& inputs, const std::vector<void*>& outputs) { return enter(inputs, outputs, qc_pool_try_submit, {}); }
  /// Accept no more requests, run those accepted to their end, and return then.
  void close() { qc_pool_close(pool_); }

  /// What the library knows of its ports, in the order in which `submit` wants them.
  std::vector<const qc_tensor_info*> inputs() const { return infos((*library_)->input_count(), (*library_)->input_info); }
  std::vector<const qc_tensor_info*> outputs() const { return infos((*library_)->output_count(), (*library_)->output_info); }
  std::string target() const { return (*library_)->target_name(); }

 private:
  SessionPool(std::shared_ptr<detail::Library> library, PoolOptions options) : library_(std::move(library)) {
    char message[512] = "";
    if (options.deadline && !(*options.deadline > 0))
      throw Error(QC_ERROR_ARGUMENT, "SessionPool: a deadline of " + std::to_string(*options.deadline) + " seconds; above 0 is supported, or none for requests that run one by one");
    const qc_pool_options plain = {options.streams ? options.streams : -1, options.threads ? options.threads : -1, options.waiting, options.pin ? 1 : 0,
                                   options.deadline.value_or(0)};
    const qc_status status = qc_pool_create(&library_->functions(), &plain, &pool_, message, sizeof message);
    if (status != QC_OK) throw Error(status, message);
  }
  template <class Submit>
  std::future<void> enter(const std::vector<const void*>& in, const std::vector<void*>& out, Submit how, std::function<void()> then) {
    if (in.size() != inputs().size() || out.size() != outputs().size())
      throw Error(QC_ERROR_SIZE, "submit: " + std::to_string(in.size()) + " inputs and " + std::to_string(out.size()) + " outputs given; the library has " +
                                     std::to_string(inputs().size()) + " and " + std::to_string(outputs().size()));
    auto request = std::make_unique<Request>();
    request->then = std::move(then);
    std::future<void> result = request->promise.get_future();
    const qc_status status = how(pool_, in.data(), out.data(), finished, request.get());
    if (status != QC_OK) throw Error(status, status == QC_ERROR_STATE ? "submit: the pool is closed" : "submit: as many requests wait as may");
    request.release();  // `finished` owns it
    return result;
  }
  struct Request {
    std::promise<void> promise;
    std::function<void()> then;
  };
  static void finished(void* user, qc_status status, const char* message) {
    const std::unique_ptr<Request> request(static_cast<Request*>(user));
    try {
      if (status != QC_OK) throw Error(status, message);
      if (request->then) request->then();
      request->promise.set_value();
    } catch (...) {
      request->promise.set_exception(std::current_exception());
    }
  }
  template <class Info>
  static std::vector<const qc_tensor_info*> infos(int count, Info info) {
    std::vector<const qc_tensor_info*> all;
    for (int i = 0; i < count; ++i) all.push_back(info(i));
    return all;
  }
  std::shared_ptr<detail::Library> library_;
  qc_pool* pool_ = nullptr;
};

}  // namespace qcompiler
