// A network whose state begins with numbers of its own, from C++:     first_state MODEL.so     (x: 4 floats). Prints its first output; the test reads it.
#include <cstdio>

#include "qcompiler/qcompiler.hpp"

int main(int, char** words) {
  qcompiler::Session session(words[1]);
  const float x[4] = {1, 1, 1, 1};
  session.input("x").copy_from(x);
  for (int i = 0; i < 3; ++i) {
    if (i == 2) session.reset();
    session.run();
    for (float value : session.outputs()[0].to_vector<float>()) std::printf("%a ", value);
    std::printf("\n");
  }
}
