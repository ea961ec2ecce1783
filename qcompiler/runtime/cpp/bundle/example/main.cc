// Runs a compiled network on made-up inputs and prints what it is and what it answers.
//
//     example MODEL.so        opens the library
//     example_linked          has the network linked to it as a shared library
//     example_static          has the network inside (a bundle made with --static)
//
// Replace `fill` by your data and keep the rest.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <vector>

#include "qcompiler/qcompiler.hpp"
#ifdef EXAMPLE_STATIC
#include EXAMPLE_HEADER
#endif

// Value i of an input is (i % 17) / 16 for floats, and i % 17 for integers.
template <class T>
std::vector<T> fill(std::size_t count) {
  std::vector<T> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<T>(static_cast<double>(i % 17) / (T(0.5) > T(0) ? 16 : 1));
  return values;
}

static void set(qcompiler::Tensor input) {
  switch (input.dtype()) {
    case QC_FLOAT32: return input.copy_from(fill<float>(input.size()));
    case QC_FLOAT64: return input.copy_from(fill<double>(input.size()));
    case QC_INT8: return input.copy_from(fill<std::int8_t>(input.size()));
    case QC_UINT8: return input.copy_from(fill<std::uint8_t>(input.size()));
    case QC_INT16: return input.copy_from(fill<std::int16_t>(input.size()));
    case QC_UINT16: return input.copy_from(fill<std::uint16_t>(input.size()));
    case QC_UINT32: return input.copy_from(fill<std::uint32_t>(input.size()));
    case QC_UINT64: return input.copy_from(fill<std::uint64_t>(input.size()));
    case QC_INT32: return input.copy_from(fill<std::int32_t>(input.size()));
    case QC_INT64: return input.copy_from(fill<std::int64_t>(input.size()));
    default: input.raw_data();  // zeros
  }
}

static void describe(const char* what, const qcompiler::Tensor& tensor) {
  std::printf("%s %s %s", what, tensor.name().c_str(), tensor.text(tensor.shape()).c_str());
  if (tensor.scale() != 0) std::printf(" scale %.9g zero point %d", static_cast<double>(tensor.scale()), static_cast<int>(tensor.zero_point()));
  std::printf("\n");
}

int main(int count, char** words) {
  try {
#if defined(EXAMPLE_STATIC)
    (void)count, (void)words;
    qcompiler::Session session = qcompiler::Session::linked(EXAMPLE_STATIC(), {2});
#elif defined(EXAMPLE_LINKED)
    (void)count, (void)words;
    qcompiler::Session session = qcompiler::Session::linked({2});
#else
    if (count != 2) return std::fprintf(stderr, "usage: %s MODEL.so\n", words[0]), 2;
    qcompiler::Session session(words[1], {2});
#endif
    std::printf("target %s\n", session.target().c_str());
    for (qcompiler::Tensor input : session.inputs()) {
      describe("input", input);
      set(input);
    }
    session.run();
    for (qcompiler::Tensor output : session.outputs()) {
      describe("output", output);
      if (output.dtype() != QC_FLOAT32) continue;
      const float* values = output.data<float>();
      for (std::size_t i = 0; i < output.size() && i < 20; ++i) std::printf("%.9g\n", static_cast<double>(values[i]));
    }
  } catch (const std::exception& error) {  // qcompiler::Error: error.code() says which kind
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
