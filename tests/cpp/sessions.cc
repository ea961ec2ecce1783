// A pool of sessions: many threads ask at once, back-pressure, closing under load, requests after it, wrong requests, and the answers themselves.
//
//     sessions MODEL.so
#include <atomic>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "check.hpp"
#include "qcompiler/pool.hpp"

using qcompiler::Error;
using qcompiler::SessionPool;

static std::vector<float> input_of(std::size_t elements, int seed) {
  std::vector<float> values(elements);
  for (std::size_t i = 0; i < elements; ++i) values[i] = static_cast<float>((i * 7 + static_cast<std::size_t>(seed)) % 13) / 12.0f;
  return values;
}

int main(int, char** words) {
  const std::string path = words[1];
  qcompiler::Session session(path);
  const std::size_t in = session.inputs().at(0).size(), out = session.outputs().at(0).size();
  std::vector<std::vector<float>> pictures, expected;
  for (int seed = 0; seed < 8; ++seed) {
    pictures.push_back(input_of(in, seed));
    session.inputs().at(0).copy_from(pictures.back());
    session.run();
    expected.push_back(session.outputs().at(0).to_vector<float>());
  }

  {  // several askers, several streams, a queue of one
    SessionPool pool(path, {2, 1, 1, true});
    std::vector<std::thread> askers;
    std::atomic<int> wrong{0}, called{0};
    for (int asker = 0; asker < 4; ++asker)
      askers.emplace_back([&, asker] {
        std::vector<float> answer(out);
        for (int i = 0; i < 50; ++i) {
          const std::size_t which = static_cast<std::size_t>(asker + i) % pictures.size();
          pool.submit({pictures[which].data()}, {answer.data()}, [&] { ++called; }).get();
          wrong += std::memcmp(answer.data(), expected[which].data(), out * sizeof(float)) != 0;
        }
      });
    for (std::thread& asker : askers) asker.join();
    expect(wrong == 0 && called == 200, "200 answers of four askers");
    std::vector<float> answer(out);
    throws(QC_ERROR_SIZE, "0 inputs and 1 outputs given; the library has 1 and 1", [&] { pool.submit({}, {answer.data()}); });
    throws(QC_ERROR_ARGUMENT, "is null", [&] { pool.submit({nullptr}, {answer.data()}).get(); });
    throws(QC_ERROR_ALIGNMENT, "must be aligned", [&] { pool.submit({reinterpret_cast<const char*>(pictures[0].data()) + 1}, {answer.data()}).get(); });
    std::future<void> thrown = pool.submit({pictures[3].data()}, {answer.data()}, [] { throw std::out_of_range("by a callback"); });
    try {
      thrown.get();
      expect(false, "a future throws what its callback throws");
    } catch (const std::out_of_range& error) {
      expect(std::string(error.what()) == "by a callback", error.what());
    }
    pool.submit({pictures[3].data()}, {answer.data()}).get();
    expect(answer == expected[3], "a wrong request spoils no other");
  }

  {  // closed under load: what was accepted is answered, everything else refused
    SessionPool pool(path, {2, 1, 3, false});
    std::atomic<int> accepted{0}, answered{0}, refused{0}, full{0};
    std::vector<std::thread> askers;
    for (int asker = 0; asker < 4; ++asker)
      askers.emplace_back([&, asker] {
        std::vector<std::vector<float>> answers(4000, std::vector<float>(out));
        std::vector<std::future<void>> futures;
        for (std::vector<float>& answer : answers) try {
            const std::vector<float>& picture = pictures[static_cast<std::size_t>(asker)];
            futures.push_back(asker == 0 ? pool.try_submit({picture.data()}, {answer.data()}) : pool.submit({picture.data()}, {answer.data()}));
            ++accepted;
          } catch (const Error& error) {
            if (error.code() == QC_ERROR_BUSY) {
              ++full;
              continue;
            }
            refused += error.code() == QC_ERROR_STATE;
            break;
          }
        for (std::future<void>& future : futures) {
          future.get();
          ++answered;
        }
        for (std::size_t i = 0; i < futures.size() && asker; ++i) failures += answers[i] != expected[static_cast<std::size_t>(asker)];
      });
    while (accepted < 40) std::this_thread::yield();
    pool.close();
    const int before = accepted;
    for (std::thread& asker : askers) asker.join();
    expect(accepted >= before && accepted == answered && refused >= 3, "closed under load");
    std::vector<float> answer(out);
    throws(QC_ERROR_STATE, "closed", [&] { pool.submit({pictures[0].data()}, {answer.data()}); });
    throws(QC_ERROR_STATE, "closed", [&] { pool.try_submit({pictures[0].data()}, {answer.data()}); });
    pool.close();
  }

  { SessionPool idle(path, {3, 1}); }
  throws(QC_ERROR_ARGUMENT, "1 to 1024", [&] { SessionPool pool(path, {0, 1}); });
  throws(QC_ERROR_ARGUMENT, "1 to 1024", [&] { SessionPool pool(path, {1, 2000}); });
  throws(QC_ERROR_ARGUMENT, "at most", [&] { SessionPool pool(path, {1, 1, -1}); });
  throws(QC_ERROR_LIBRARY, "can't be opened", [&] { SessionPool pool(path + ".none"); });
  return failures != 0;
}
