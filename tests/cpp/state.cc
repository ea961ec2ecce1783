// A network that keeps states h and c, from C++:     state MODEL.so     (x: 6 floats, y: 3 floats). Prints what it sees; the test reads it.
#include <cstdio>

#include "qcompiler/qcompiler.hpp"

int main(int, char** words) {
  qcompiler::Session session(words[1]);
  const float x[6] = {1, -2, 3, -4, 5, -6};
  float none[5] = {0};
  session.input("x").copy_from(x);
  for (int i = 0; i < 4; ++i) {
    if (i == 2) session.reset();
    session.run();
    for (float value : session.output("y").to_vector<float>()) std::printf("%a ", value);
    std::printf("\n");
  }
  for (qcompiler::Tensor tensor : session.inputs()) std::printf("%s %d\n", tensor.name().c_str(), static_cast<int>(tensor.is_state()));
  try {
    session.input("h").bind(none, 5);
  } catch (const qcompiler::Error& error) {
    std::printf("%s\n", error.what());
  }
  try {
    session.output("c_out").bind(none, 5);
  } catch (const qcompiler::Error& error) {
    std::printf("%s\n", error.what());
  }
}
