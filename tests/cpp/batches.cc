// A pool that gathers requests into batches: which batches ran, the answers, wrong requests among right ones, closing, and deadlines that can't be.
//
//     batches MODEL.so ONE.so      MODEL: x float32 [{1, 2, 4}, n] at its least batch first; ONE: a library for one shape
#include <cstring>
#include <mutex>
#include <thread>

#include "check.hpp"
#include "qcompiler/pool.hpp"

using qcompiler::PoolOptions;
using qcompiler::SessionPool;

static qc_library library;
static std::mutex lock;
static std::vector<std::int64_t> ran;  // rows of each run

static qc_status counted(qc_session* session) {
  {
    const std::lock_guard<std::mutex> guard(lock);
    ran.push_back(library.session_input_info(session, 0)->shape[0]);
  }
  return library.session_run(session);
}

static std::vector<std::int64_t> runs() {
  const std::lock_guard<std::mutex> guard(lock);
  return std::exchange(ran, {});
}

int main(int, char** words) {
  char message[256];
  expect(qc_library_open(words[1], &library, message, sizeof message) == QC_OK, "open");
  qc_library watched = library;
  watched.handle = nullptr;  // closed with `library`, not with each pool
  watched.session_run = counted;
  const std::size_t in = library.input_info(0)->bytes / 4;
  std::vector<std::size_t> out;
  for (int i = 0; i < library.output_count(); ++i) out.push_back(library.output_info(i)->bytes / 4);

  struct Request {
    std::vector<float> x;
    std::vector<std::vector<float>> wanted, got;
    std::future<void> done;
    std::vector<void*> outputs() {
      std::vector<void*> all;
      for (std::vector<float>& g : got) all.push_back(g.data());
      return all;
    }
  };
  std::vector<Request> requests(24);
  {
    qcompiler::Session session(words[1]);
    for (std::size_t r = 0; r < requests.size(); ++r) {
      for (std::size_t i = 0; i < in; ++i) requests[r].x.push_back(static_cast<float>((i * 5 + r * 3) % 11) / 5.0f - 1.0f);
      session.inputs().at(0).copy_from(requests[r].x);
      session.run();
      for (qcompiler::Tensor tensor : session.outputs()) requests[r].wanted.push_back(tensor.to_vector<float>());
      requests[r].got = requests[r].wanted;
      for (std::vector<float>& g : requests[r].got) g.assign(g.size(), -1);
    }
  }
  const auto answered = [&](std::size_t begin, std::size_t end) {
    bool equal = true;
    for (std::size_t r = begin; r < end; ++r) {
      requests[r].done.get();
      for (std::size_t i = 0; i < out.size(); ++i) equal &= std::memcmp(requests[r].got[i].data(), requests[r].wanted[i].data(), out[i] * 4) == 0;
    }
    return equal;
  };
  const std::vector<std::int64_t> one{1, static_cast<std::int64_t>(in)}, four{4, static_cast<std::int64_t>(in)};

  {  // full batches at once, the rest at the deadline; a request of another batch runs by itself and in its turn
    SessionPool pool(watched, PoolOptions{1, 1, 0, false, 0.3});
    for (std::size_t r = 0; r < 11; ++r)
      requests[r].done = r % 2 ? pool.submit_at({one}, {requests[r].x.data()}, requests[r].outputs()) : pool.submit({requests[r].x.data()}, requests[r].outputs());
    expect(answered(0, 11), "eleven requests, in batches");
    expect(runs() == std::vector<std::int64_t>{4, 4, 2, 1}, "the largest batch that is full, and what is left at the deadline");
    std::vector<float> whole;
    for (std::size_t r = 0; r < 4; ++r) whole.insert(whole.end(), requests[r].x.begin(), requests[r].x.end());
    std::vector<std::vector<float>> got;
    std::vector<void*> outputs;
    for (std::size_t o : out) got.emplace_back(4 * o);
    for (std::vector<float>& g : got) outputs.push_back(g.data());
    requests[0].done = pool.submit({requests[0].x.data()}, requests[0].outputs());
    std::future<void> alone = pool.submit_at({four}, {whole.data()}, outputs);
    expect(answered(0, 1), "a request before one of another batch");
    alone.get();
    bool equal = true;
    for (std::size_t r = 0; r < 4; ++r)
      for (std::size_t i = 0; i < out.size(); ++i) equal &= std::memcmp(got[i].data() + r * out[i], requests[r].wanted[i].data(), out[i] * 4) == 0;
    expect(equal && runs() == std::vector<std::int64_t>{1, 4}, "a request of four rows");

    requests[0].done = pool.submit({requests[0].x.data()}, requests[0].outputs());
    throws(QC_ERROR_ARGUMENT, "is null", [&] { pool.submit({nullptr}, requests[1].outputs()).get(); });
    throws(QC_ERROR_ALIGNMENT, "must be aligned", [&] { pool.submit({reinterpret_cast<const char*>(requests[1].x.data()) + 1}, requests[1].outputs()).get(); });
    throws(QC_ERROR_SIZE, "no shape that this library was compiled for", [&] { pool.submit_at({{3, static_cast<std::int64_t>(in)}}, {whole.data()}, outputs).get(); });
    requests[2].done = pool.submit({requests[2].x.data()}, requests[2].outputs());
    expect(answered(0, 1) && answered(2, 3), "wrong requests spoil no others");
    runs();
  }

  {  // several askers and streams; a queue asked to be shorter than a batch holds one
    SessionPool pool(watched, PoolOptions{2, 1, 1, false, 0.002});
    std::vector<std::thread> askers;
    for (std::size_t asker = 0; asker < 4; ++asker)
      askers.emplace_back([&, asker] {
        for (int turn = 0; turn < 20; ++turn)
          for (std::size_t r = asker; r < requests.size(); r += 4) {
            if (requests[r].done.valid()) requests[r].done.get();
            requests[r].done = pool.submit({requests[r].x.data()}, requests[r].outputs());
          }
      });
    for (std::thread& asker : askers) asker.join();
    expect(answered(0, requests.size()), "four askers, two streams");
    std::int64_t rows = 0;
    for (std::int64_t r : runs()) rows += r;
    expect(rows == 20 * static_cast<std::int64_t>(requests.size()), "every request ran once");
  }

  {  // closing does not wait for deadlines
    SessionPool pool(watched, PoolOptions{2, 1, 0, false, 3600.0});
    for (std::size_t r = 0; r < 3; ++r) requests[r].done = pool.submit({requests[r].x.data()}, requests[r].outputs());
    pool.close();
    expect(answered(0, 3) && runs().size() == 2, "closed before the deadline");
  }

  {  // none: one by one
    SessionPool pool(watched, PoolOptions{});
    for (std::size_t r = 0; r < 5; ++r) requests[r].done = pool.submit({requests[r].x.data()}, requests[r].outputs());
    expect(answered(0, 5) && runs() == std::vector<std::int64_t>(5, 1), "without a deadline");
  }

  for (double seconds : {0.0, -1.0}) throws(QC_ERROR_ARGUMENT, "above 0 is supported", [&] { SessionPool pool(watched, PoolOptions{1, 1, 0, false, seconds}); });
  throws(QC_ERROR_ARGUMENT, "a deadline of 3601 seconds", [&] { SessionPool pool(watched, PoolOptions{1, 1, 0, false, 3601.0}); });
  throws(QC_ERROR_ARGUMENT, "for several batches", [&] { SessionPool pool(words[2], PoolOptions{1, 1, 0, false, 1.0}); });
  qc_pool* pool = nullptr;
  qc_pool_options options = {1, 1, 0, 0, -1.0};
  expect(qc_pool_create(&library, &options, &pool, message, sizeof message) == QC_ERROR_ARGUMENT && !pool && std::strstr(message, "a deadline of -1 seconds"), message);
  options.deadline = 0;  // its default in C: one by one
  expect(qc_pool_create(&library, &options, &pool, message, sizeof message) == QC_OK, "a deadline of 0 in C");
  qc_pool_destroy(pool);
  qc_library_close(&library);
  return failures != 0;
}
