"""A C++ program without Python or TVM: write a bundle, build a program against it, run it. Needs a C++ compiler."""

import subprocess
from pathlib import Path

import numpy as np

import qcompiler
from qcompiler.backend.bundle import make_bundle
from qcompiler.cli.demo import MODEL, demo_data

PROGRAM = """
#include <cstdio>
#include <vector>
#include "qcompiler/qcompiler.hpp"

int main(int, char** arguments) {
  qcompiler::Session session(arguments[1], {1});  // one thread
  std::vector<float> image(16 * 16);
  while (std::fread(image.data(), sizeof(float), image.size(), stdin) == image.size()) {
    session.input("image").copy_from(image);
    session.run();
    const float* logits = session.output("logits").data<float>();
    int best = 0;
    for (int i = 1; i < 10; ++i) best = logits[i] > logits[best] ? i : best;
    std::printf("%d ", best);
  }
}
"""


def main() -> None:
    calibration, evaluation, labels = demo_data()
    library = qcompiler.compile(MODEL, calibration=calibration[:40], preset="fast").save("digits.so")

    device = Path("device")  # what to copy to a device: libraries, headers, a CMake package, a program that runs the network
    make_bundle(library, device)
    Path("service.cc").write_text(PROGRAM)
    subprocess.run(["g++", "-std=c++17", "-O2", f"-I{device / 'include'}", "service.cc", "-o", "service", "-ldl", "-pthread"], check=True)

    images = np.concatenate([sample["image"] for sample in evaluation[:20]])
    answers = subprocess.run(["./service", str(device / "lib" / "libdigits.so")], input=images.tobytes(), capture_output=True, check=True).stdout
    print("answers:", answers.decode())
    print("labels: ", *labels[:20])


if __name__ == "__main__":
    main()
