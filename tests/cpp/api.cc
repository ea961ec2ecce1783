// The C++ interface: what is thrown when, moves, and sessions in several threads. Built as C++17 and C++20, and with one network linked (LINKED).
//
//     api MODEL.so OTHER.so      the same network for two targets
#include <cmath>
#include <cstdio>
#include <thread>

#include "check.hpp"
#include "qcompiler/qcompiler.hpp"

using qcompiler::Session;

static std::vector<float> answer(Session& session, int seed) {
  qcompiler::Tensor input = session.inputs().at(0);
  std::vector<float> values(input.size());
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>((i * 7 + static_cast<std::size_t>(seed)) % 13) / 12.0f;
  input.copy_from(values);
  session.run();
  return session.outputs().at(0).to_vector<float>();
}

int main(int count, char** words) {
  if (count != 3) return 2;
#if __cplusplus >= 202002L
  Session session(words[1], {.threads = 2});
#else
  Session session(words[1], {2});
#endif
  static_assert(!std::is_copy_constructible_v<Session> && std::is_nothrow_move_constructible_v<Session> && std::is_nothrow_move_assignable_v<Session>);

  qcompiler::Tensor input = session.inputs().at(0), output = session.outputs().at(0);
  const std::vector<float> values(input.size());
  throws(QC_ERROR_STATE, "has not been set", [&] { session.run(); });
  throws(QC_ERROR_NAME, input.name().c_str(), [&] { session.input("nobody"); });
  throws(QC_ERROR_NAME, output.name().c_str(), [&] { session.output("nobody"); });
  throws(QC_ERROR_SIZE, "elements", [&] { input.copy_from(std::vector<float>(input.size() + 1)); });
  throws(QC_ERROR_SIZE, "has shape [", [&] { input.copy_from(values.data(), {1, 2, 3}); });
  throws(QC_ERROR_ARGUMENT, "null", [&] { input.copy_from(static_cast<const float*>(nullptr)); });
  throws(QC_ERROR_ARGUMENT, "element type", [&] { input.copy_from(std::vector<double>(input.size())); });
  throws(QC_ERROR_ARGUMENT, "const", [&] { output.bind(values.data(), output.size()); });
  throws(QC_ERROR_SIZE, "bytes", [&] { input.bind(values.data(), input.size() - 1); });
  throws(QC_ERROR_ALIGNMENT, "aligned", [&] {
    static char bytes[1 << 16];
    input.bind(reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(bytes) | 3) - 2), input.size());
  });
  throws(QC_ERROR_LIBRARY, "can't be opened", [] { Session nowhere("/nowhere/model.so"); });
  throws(QC_ERROR_ARGUMENT, "threads", [&] { Session none(words[1], {0}); });
  throws(QC_ERROR_LIBRARY, "no ELF header", [] { Session text(__FILE__); });
  throws(QC_ERROR_LIBRARY, "", [] { Session folder("/"); });

  expect(session.manifest().find("\"steps\"") != std::string::npos && session.manifest().back() == '}', "the manifest");
  std::printf("scale %.9g %d\n", static_cast<double>(input.scale()), static_cast<int>(input.zero_point()));
  expect(input.scale() > 0 && input.zero_point() >= -128 && input.zero_point() <= 127, "quantization of the input");

  // Moves; ports outlive the object they came from.
  const std::vector<float> first = answer(session, 1);
  Session moved = std::move(session);
  expect(answer(moved, 1) == first, "a moved session runs");
  session = Session(words[1]);
  expect(answer(session, 1) == first, "one and two threads agree");
  session = std::move(moved);
  expect(session.outputs().at(0).to_vector<float>() == output.to_vector<float>(), "ports follow their session");

  // Two networks in one process keep apart.
  Session other(words[2]);
  expect(other.target() != session.target(), "two libraries, two targets");
  expect(answer(other, 1) == first, "two targets, the same bytes");
#ifdef LINKED
  Session linked = Session::linked({2});
  expect(linked.target() == session.target() && other.target() != linked.target(), "a linked network beside opened ones");
  expect(answer(linked, 1) == first && answer(other, 2) == answer(linked, 2), "they agree");
#endif

  // Sessions in several threads.
  std::vector<std::vector<float>> wanted;
  for (int i = 0; i < 4; ++i) wanted.push_back(answer(session, i));
  std::vector<int> good(4);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&, i] {
      Session mine = session.another({1 + i % 2});
      int same = 0;
      for (int j = 0; j < 50; ++j) same += answer(mine, (i + j) % 4) == wanted[static_cast<std::size_t>((i + j) % 4)];
      good[static_cast<std::size_t>(i)] = same;
    });
  for (std::thread& thread : threads) thread.join();
  for (int same : good) expect(same == 50, "a thread's own session gives the same bytes every time");
  return failures != 0;
}
