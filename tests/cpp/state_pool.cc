// Streams of a network with states h and c in a pool:     state_pool MODEL.so     (x: 6 floats, y: 3 floats). Each of two streams hands its states from request to
// request, in turns with the other; prints y of every request. The test reads it.
#include <cstdio>
#include <cstring>

#include "qcompiler/pool.hpp"

int main(int, char** words) {
  qcompiler::SessionPool pool(words[1], {2});
  float x[2][6] = {{1, -2, 3, -4, 5, -6}, {6, 5, -4, -3, 2, 1}}, y[3], states[2][2][5] = {}, next[2][5];
  for (int request = 0; request < 6; ++request) {
    int stream = request % 2;
    pool.submit({x[stream], states[stream][0], states[stream][1]}, {y, next[0], next[1]}).get();
    std::memcpy(states[stream], next, sizeof next);
    for (float value : y) std::printf("%a ", value);
    std::printf("\n");
  }
}
