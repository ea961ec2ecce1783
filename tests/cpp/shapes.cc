// A library for several shapes: every shape equals what Python answered; padding, refusals, and the C functions behind them.
//
//     shapes MODEL.so FOLDER     the folder holds LENGTH.ids, LENGTH.mask (int64) and LENGTH.out (float32) for every length in `lengths`
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

#include "check.hpp"
#include "qcompiler/pool.hpp"
#include "qcompiler/qcompiler.hpp"

using qcompiler::Session;

template <class T>
static std::vector<T> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<T> values(bytes.size() / sizeof(T));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  return values;
}

static std::vector<float> answer(Session& session, const std::string& folder, std::int64_t length) {
  const std::string stem = folder + "/" + std::to_string(length);
  session.fit({{"ids", {1, length}}, {"mask", {1, length}}});
  session.input("ids").copy_from(read<std::int64_t>(stem + ".ids"));
  session.input("mask").copy_from(read<std::int64_t>(stem + ".mask"));
  session.run();
  return session.outputs().at(0).to_vector<float>();
}

static void pooled(const std::string& library, const std::string& folder, const std::vector<std::string>& lengths) {
  struct Request {
    std::vector<std::int64_t> ids, mask;
    std::vector<float> wanted, got;
    std::future<void> done;
  };
  qcompiler::SessionPool pool(library, {2});
  std::vector<Request> requests;
  for (int turn = 0; turn < 3; ++turn)
    for (const std::string& length : lengths) {
      const std::string stem = folder + "/" + length;
      requests.push_back({read<std::int64_t>(stem + ".ids"), read<std::int64_t>(stem + ".mask"), read<float>(stem + ".out"), {}, {}});
    }
  for (Request& r : requests) {
    r.got.assign(r.wanted.size(), 0);
    const std::int64_t length = static_cast<std::int64_t>(r.ids.size());
    const std::vector<const void*> in = {r.ids.data(), r.mask.data()};
    r.done = length == 8 ? pool.submit(in, {r.got.data()}) : pool.submit_at({{1, length}, {1, length}}, in, {r.got.data()});
  }
  bool equal = true;
  for (Request& r : requests) {
    r.done.get();
    equal = equal && std::memcmp(r.got.data(), r.wanted.data(), r.got.size() * sizeof(float)) == 0;
  }
  expect(equal, "a pool runs each request at its shape");
  Request& r = requests.front();
  const std::vector<const void*> in = {r.ids.data(), r.mask.data()};
  throws(QC_ERROR_SIZE, "is no shape that this library was compiled for", [&] { pool.submit_at({{1, 25}, {1, 25}}, in, {r.got.data()}).get(); });
  throws(QC_ERROR_SIZE, "compiled for", [&] { pool.submit_at({std::vector<std::int64_t>(9, 1), {1, 8}}, in, {r.got.data()}).get(); });
  throws(QC_ERROR_SIZE, "1 shapes given; the library has 2 inputs", [&] { pool.submit_at({{1, 8}}, in, {r.got.data()}); });
}

int main(int count, char** words) {
  if (count < 3) return 2;
  const std::string folder = words[2];
  Session session(words[1]);
  expect(session.shapes().size() == 3 && session.shapes()[1].at("ids") == std::vector<std::int64_t>{1, 16}, "shapes() lists what was compiled");
  for (int turn = 0; turn < 2; ++turn)
    for (int i = 3; i < count; ++i) {
      const std::int64_t length = std::atoll(words[i]);
      const std::vector<float> wanted = read<float>(folder + "/" + words[i] + ".out"), got = answer(session, folder, length);
      expect(got.size() == wanted.size() && std::memcmp(got.data(), wanted.data(), got.size() * sizeof(float)) == 0, std::string("length ") + words[i]);
      expect(session.outputs().at(0).shape().at(1) == length && session.input("ids").shape().at(1) == length, "ports have the caller's shape");
    }

  throws(QC_ERROR_SIZE, "is no shape that this library was compiled for", [&] { session.fit({{"ids", {1, 25}}}); });
  throws(QC_ERROR_SIZE, "ids [1, 8], mask [1, 8]; ids [1, 16]", [&] { session.fit({{"ids", {1, 8}}, {"mask", {1, 16}}}); });
  throws(QC_ERROR_SIZE, "compiled for", [&] { session.fit({{"ids", {8}}}); });
  throws(QC_ERROR_SIZE, "compiled for", [&] { session.fit({{"ids", {1, 0}}}); });
  throws(QC_ERROR_SIZE, "dimensions", [&] { session.fit({{"ids", {1, 2, 3, 4, 5, 6, 7, 8, 9}}}); });
  throws(QC_ERROR_NAME, "no 'words'; known: 'ids'", [&] { session.fit({{"words", {1, 8}}}); });
  throws(QC_ERROR_ARGUMENT, "shapes are needed", [&] { session.fit({}); });

  session.fit({{"ids", {1, 11}}});
  throws(QC_ERROR_STATE, "has not been set", [&] { session.run(); });  // a new shape begins anew
  throws(QC_ERROR_STATE, "'ids' is padded from [1, 11] to [1, 16]", [&] { session.input("ids").data<std::int64_t>(); });
  throws(QC_ERROR_STATE, "is padded", [&] { session.outputs().at(0).data<float>(); });
  throws(QC_ERROR_SIZE, "elements", [&] { session.input("ids").copy_from(std::vector<std::int64_t>(16)); });
  throws(QC_ERROR_ARGUMENT, "element type", [&] { session.input("ids").copy_from(std::vector<float>(11)); });
  throws(QC_ERROR_ARGUMENT, "null", [&] { session.input("ids").copy_from(static_cast<const std::int64_t*>(nullptr)); });

  session.fit({{"ids", {1, 24}}});  // compiled: zero copy as ever
  std::vector<std::int64_t> ids = read<std::int64_t>(folder + "/24.ids"), mask = read<std::int64_t>(folder + "/24.mask");
  session.input("ids").bind(ids.data(), ids.size());
  session.input("mask").bind(mask.data(), mask.size());
  std::vector<float> out(session.outputs().at(0).size());
  session.outputs().at(0).bind(out.data(), out.size());
  session.run();
  expect(out == read<float>(folder + "/24.out"), "bound buffers at another shape");

  pooled(words[1], folder, {words + 3, words + count});

  qc_library library;
  char message[256];
  expect(qc_library_open(words[1], &library, message, sizeof message) == QC_OK, "open");
  qc_session* raw = nullptr;
  expect(library.session_create(1, &raw) == QC_OK && library.shape_count() == 3, "the C interface");
  expect(library.shape_step_count(0) == library.step_count() && library.shape_step_count(3) == 0 && library.shape_step_count(-1) == 0, "step counts");
  expect(library.shape_input_info(1, 0)->shape[1] == 16 && !library.shape_input_info(3, 0) && !library.shape_output_info(0, 9), "port infos");
  expect(library.session_set_shape(raw, 3) == QC_ERROR_ARGUMENT && library.session_set_shape(raw, -1) == QC_ERROR_ARGUMENT, "no such shape");
  expect(session.steps() == library.shape_step_count(2), "steps of the shape that the session has");
  expect(library.session_set_shape(nullptr, 0) == QC_ERROR_ARGUMENT && library.session_fit(raw, nullptr, 1) == QC_ERROR_ARGUMENT, "null");
  expect(library.session_set_shape(raw, 2) == QC_OK && library.session_input_info(raw, 1)->shape[1] == 24 && !library.session_input_info(raw, 2), "set_shape");
  expect(library.session_write(raw, "ids", nullptr, 8) == QC_ERROR_ARGUMENT && library.session_write(raw, "ids", ids.data(), 8) == QC_ERROR_SIZE, "write");
  expect(library.session_read(raw, "nobody", out.data(), 8) == QC_ERROR_NAME, "read");
  library.session_destroy(raw);
  qc_library_close(&library);
  return failures ? 1 : 0;
}
